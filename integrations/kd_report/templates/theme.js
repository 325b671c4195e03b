(function () {
  var order = ["auto", "light", "dark"], button = document.querySelector("button.theme");
  function show(theme) {
    document.documentElement.dataset.theme = theme;
    button.textContent = "Theme: " + theme;
    button.onclick = function () { show(order[(order.indexOf(theme) + 1) % 3]); };
  }
  show(order.includes(location.hash.slice(1)) ? location.hash.slice(1) : "auto");
})();
