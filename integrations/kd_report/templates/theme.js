(function () {
  var root = document.documentElement, button = document.querySelector("button.theme"), order = ["auto", "light", "dark"], now = 0;
  function show() {
    if (order[now] === "auto") root.removeAttribute("data-theme"); else root.setAttribute("data-theme", order[now]);
    button.textContent = "Theme: " + order[now];
  }
  button.addEventListener("click", function () { now = (now + 1) % 3; show(); });
  var asked = order.indexOf(location.hash.slice(1));
  if (asked > 0) now = asked;
  show();
})();
