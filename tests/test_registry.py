"""Names, entry points and what goes wrong with them; distributions are folders on sys.path, as pip leaves them."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from kd_plugins import Batch, Distiller, DistillError, Needs, Stage, bind, make_optimizers, play
from kd_plugins.catalog.about import describe, refusals
from kd_plugins.catalog.cli import main as cli
from kd_plugins.catalog.installed import distribution_of, list_distillers
from kd_plugins.catalog.registry import create_distiller, get_distiller, name_of, options_from_strings
from kd_plugins.reading import network
from kd_plugins.reading.network import adapt

MODULE = """
from kd_plugins.catalog.options import OptimSpec
from kd_plugins.distiller import Distiller

class Mine(Distiller):
    '''Mine, in one line
    and another.

    Args:
        strength: Of the term.
    '''

    def __init__(self, *, strength: float = 1.0, rounds: int = 2):
        super().__init__()
        self.strength, self.rounds = strength, rounds

    def optimizers(self):
        return {"critic": OptimSpec(lr=2e-4)}

class NotOne:
    pass
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution with distillers, as `pip install` does."""

    def install(name: str, version: str = "1.0", modules: dict[str, str] | None = None, **entries: str) -> Path:
        folder = tmp_path / f"{name}-{version}-{len(list(tmp_path.iterdir()))}"
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [f"{entry} = {value}" for entry, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[kd_plugins.distillers]", *lines, ""]))
        for module, text in (modules or {}).items():
            (folder / f"{module}.py").write_text(text)
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(str(folder))
        return folder

    yield install
    for module in [module for module in sys.modules if module.startswith("installed_by_test")]:
        del sys.modules[module]


def test_the_list_has_what_is_installed_and_imports_no_method():
    code = (
        "import sys; from kd_plugins.catalog.installed import list_distillers; names = list_distillers();"
        "print(*names); print([m for m in sys.modules if m.startswith('kd_plugins.methods.')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0].split() == sorted(out[0].split())
    assert {"kd", "nst", "internal"} <= set(out[0].split())
    assert out[1] == "[]"


def test_a_plugin_is_found_by_name_loaded_when_asked_for_and_made_with_its_options(install):
    install("some-plugin", "2.5", {"installed_by_test_a": MODULE}, mine="installed_by_test_a:Mine")
    assert "mine" in list_distillers()
    assert "installed_by_test_a" not in sys.modules
    cls = get_distiller("mine")
    assert issubclass(cls, Distiller)
    assert str(distribution_of("mine")) == "some-plugin 2.5"
    assert name_of(cls) == "mine"
    distiller = create_distiller("mine", strength=3)
    assert (distiller.strength, distiller.rounds) == (3.0, 2)
    assert isinstance(distiller.strength, float)


def test_module_and_class_bypass_the_entry_points(install):
    install("some-plugin", modules={"installed_by_test_b": MODULE})
    assert get_distiller("installed_by_test_b:Mine").__name__ == "Mine"
    assert create_distiller("installed_by_test_b:Mine", rounds=5).rounds == 5
    assert distribution_of("installed_by_test_b:Mine") is None
    assert name_of(get_distiller("installed_by_test_b:Mine")) == "installed_by_test_b:Mine"
    with pytest.raises(DistillError, match=r"No module named 'installed_by_nobody'.*PYTHONPATH"):
        get_distiller("installed_by_nobody:Mine")


def test_a_loose_file_is_found_in_the_folder_where_a_script_is_started(tmp_path, monkeypatch):
    """A console script has its own folder first on sys.path, and not the current one."""
    (tmp_path / "loose_by_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "bin"), *(place for place in sys.path if place)])
    assert get_distiller("loose_by_test:Mine").__name__ == "Mine"


def test_an_unknown_name_gets_a_hint_and_the_list():
    with pytest.raises(DistillError, match=r"got 'intrenal'\. Did you mean internal\? Installed: .*kd, .*nst"):
        get_distiller("intrenal")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("import a_module_that_nobody_has", ModuleNotFoundError),
        ("def broken(:", SyntaxError),
        ("raise SystemExit(3)", SystemExit),
        ("Other = 1", AttributeError),
    ],
)
def test_a_broken_plugin_fails_only_when_asked_for_and_says_whose_it_is(install, text, cause):
    install("broken-plugin", "0.3", {"installed_by_test_c": text}, broken="installed_by_test_c:Mine")
    assert "broken" in list_distillers()
    with pytest.raises(DistillError) as raised:
        get_distiller("broken")
    for part in ("broken-plugin 0.3", "installed_by_test_c:Mine", cause.__name__, str(raised.value.__cause__)):
        assert part in str(raised.value)
    assert isinstance(raised.value.__cause__, cause)


def test_what_is_no_distiller_is_refused(install):
    install("wrong-plugin", modules={"installed_by_test_d": MODULE}, wrong="installed_by_test_d:NotOne")
    with pytest.raises(
        DistillError, match=r"'wrong' of wrong-plugin 1\.0 .* subclass of kd_plugins\.Distiller, got .*NotOne"
    ):
        get_distiller("wrong")


def test_one_name_of_two_distributions_is_an_error_that_names_both(install):
    install("first-plugin", "1.0", {"installed_by_test_e": MODULE}, mine="installed_by_test_e:Mine", other="x:Y")
    install("second-plugin", "2.0", {"installed_by_test_f": MODULE}, mine="installed_by_test_f:Mine")
    assert list_distillers().count("mine") == 1
    for ask in (get_distiller, distribution_of, create_distiller):
        with pytest.raises(DistillError, match=r"first-plugin 1\.0|second-plugin 2\.0") as raised:
            ask("mine")
        assert "first-plugin 1.0 (installed_by_test_e:Mine)" in str(raised.value)
        assert "second-plugin 2.0 (installed_by_test_f:Mine)" in str(raised.value)
    assert str(distribution_of("other")) == "first-plugin 1.0"


def test_the_same_distribution_found_twice_is_one(install):
    install("same-plugin", "1.0", {"installed_by_test_g": MODULE}, mine="installed_by_test_g:Mine")
    install("Same_Plugin", "1.0", {"installed_by_test_g": MODULE}, mine="installed_by_test_g:Mine")
    assert get_distiller("mine").__name__ == "Mine"


def test_without_any_distiller_the_error_says_how_to_install(monkeypatch):
    monkeypatch.setattr("kd_plugins.catalog.installed._entry_points", lambda group, _: [])
    assert list_distillers() == []
    with pytest.raises(DistillError, match="pip install -e ."):
        get_distiller("kd")


def test_describe_reads_class_and_constructor(install):
    install("some-plugin", modules={"installed_by_test_h": MODULE}, mine="installed_by_test_h:Mine")
    about = describe("mine")
    assert about.summary == "Mine, in one line and another."
    assert about.options["strength"].help == "Of the term."
    assert about.groups["critic"].lr == 2e-4
    assert about.kind == "offline"


def changed(base: type[Distiller] = Distiller, **attributes: object) -> Distiller:
    return type("Changed", (base,), attributes)()


@pytest.mark.parametrize(
    ("distiller", "hosts"),
    [
        (changed(), {}),
        (changed(data=False), {"transformers": "makes its own data", "timm-task": "makes its own data"}),
        (changed(peers=True), {"timm-task": "trains several networks together"}),
        (changed(tasks=("token",)), dict.fromkeys(("timm", "timm-task"), "does not fit classification")),
        (changed(stages=lambda self: [Stage("a"), Stage("b")]), {"timm-task": "trains in several stages"}),
        (changed(needs=lambda self: Needs(streams={"x": 0.5})), {"timm-task": "reads held-out streams"}),
        (changed(needs=lambda self: Needs(index=True)), {"timm-task": "reads row numbers"}),
        (changed(extras=lambda self: {"critic": nn.Linear(1, 1)}), {"timm-task": "has optimizers of its own"}),
        (changed(extras=lambda self: {"critic": self.made_in_setup}), {"timm-task": "has optimizers of its own"}),
        (
            changed(prepare=lambda self, nets, batches: None),
            {"timm-task": "passes over the training data first"},
        ),
    ],
)
def test_hosts_follow_from_what_a_method_needs(distiller, hosts):
    assert refusals(distiller) == hosts


def test_what_set_up_tells_is_not_promised_before_it():
    """The stages of `internal` follow the networks' layers."""
    assert describe("internal").hosts == ["bare", "accelerate", "transformers", "timm"]


BUILT = '''
from kd_plugins import Distiller, OptimSpec


class Waits(Distiller):
    """Has no critic before set-up."""

    def extras(self):
        return {"critic": self.critic} if self.ready else {}


class Misses(Waits):
    """Misses it."""

    def extras(self):
        return {"critic": self.critic}

    def optimizers(self):
        return dict.fromkeys(self.extras(), OptimSpec())
'''


def test_a_method_whose_groups_are_built_in_set_up_is_described(install):
    names = {"waits": "built_in_set_up:Waits", "misses": "built_in_set_up:Misses"}
    install("some-plugin", modules={"built_in_set_up": BUILT}, **names)
    for name in names:
        about = describe(name)
        assert (about.refusals, about.groups) == ({"timm-task": "has optimizers of its own"}, {})


# --- names with dots --------------------------------------------------------------------------------------------------


def test_a_dotted_option_overrides_a_group_of_a_single_distiller(install):
    install("some-plugin", modules={"installed_by_test_i": MODULE}, mine="installed_by_test_i:Mine")
    distiller = create_distiller(
        "mine", **{"mine.strength": 2.0, "critic.lr": 1e-5, "critic.options": {"betas": [0, 0.9]}}
    )
    assert distiller.strength == 2.0
    assert distiller.optim_overrides == {"critic": {"lr": 1e-5, "options": {"betas": [0, 0.9]}}}
    with pytest.raises(DistillError, match=r"'critic\.lrr' .* Did you mean lr\?"):
        create_distiller("mine", **{"critic.lrr": 1e-5})
    with pytest.raises(DistillError, match=r"expected critic\.lr to be float from 0, got 'fast'"):
        create_distiller("mine", **{"critic.lr": "fast"})


def test_a_composition_is_named_with_plus_signs():
    both = create_distiller("kd+nst", **{"kd.temperature": 2.0, "nst.weight": 7, "kernel": "linear"})
    assert list(both.parts) == ["kd", "nst"]
    assert both.parts["kd"].config["temperature"] == 2.0
    assert both.parts["nst"].config["weight"] == 7.0
    assert both.parts["nst"].config["kernel"] == "linear"
    with pytest.raises(DistillError, match="'kd' twice"):
        create_distiller("kd+kd")
    with pytest.raises(DistillError, match=r"create_distiller\(\)"):
        get_distiller("kd+nst")


def test_groups_of_a_part_are_overridden_with_two_dots(install):
    install("some-plugin", modules={"installed_by_test_j": MODULE}, mine="installed_by_test_j:Mine")
    both = create_distiller("kd+mine", **{"mine.critic.lr": 1e-5, "strength": 4})
    assert both.parts["mine"].optim_overrides == both.optim_overrides == {"critic": {"lr": 1e-5}}
    assert both.parts["mine"].strength == 4.0
    assert not both.parts["kd"].optim_overrides
    with pytest.raises(DistillError, match=r"written kd\.critic\.lr|written mine\.critic\.lr"):
        create_distiller("kd+mine", **{"critic.lr": 1e-5})


def test_an_option_of_several_parts_needs_its_part(install):
    modules = {"installed_by_test_k": MODULE, "installed_by_test_l": MODULE}
    install("some-plugin", "1.0", modules, mine="installed_by_test_k:Mine", yours="installed_by_test_l:Mine")
    with pytest.raises(DistillError, match=r"write mine\.strength or yours\.strength"):
        create_distiller("mine+yours", strength=2)
    with pytest.raises(DistillError) as raised:
        create_distiller("mine+yours", strenght=2)
    assert "Did you mean strength?" in str(raised.value)
    assert "mine.strength: float = 1.0    Of the term." in str(raised.value)
    assert "yours.rounds: int = 2" in str(raised.value)
    with pytest.raises(DistillError, match="twice"):
        create_distiller("mine+kd", **{"strength": 2, "mine.strength": 3})


# --- a plug-in of somebody else ---------------------------------------------------------------------------------------


def test_the_example_plugin_trains_by_its_name(install, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "plugins" / "kd_plugins_example"))
    if "example_attention_transfer" not in list_distillers():
        install("kd-plugins-example", "0.1.0", example_attention_transfer="kd_plugins_example:ExampleAttentionTransfer")
    assert describe("example_attention_transfer").paper.bibtex.startswith("@inproceedings{zagoruyko2017")
    options = options_from_strings("example_attention_transfer", ["layers=body", "teacher_layers=body.0", "weight=10"])
    distiller = create_distiller("example_attention_transfer", **options)

    def network(width: int, stride: int) -> nn.Module:
        body = nn.Sequential(nn.Conv2d(3, width, 3, stride, 1), nn.Tanh())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))
        return nn.Sequential(OrderedDict(body=body, head=head))

    torch.manual_seed(0)
    student, teacher = network(4, 2), network(8, 1)
    batch = Batch.of(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)
    nets = bind(distiller, student, teacher, batch=batch)
    optimizers = make_optimizers(distiller, torch.optim.SGD(student.parameters(), lr=0.5), nets)
    losses = []
    for _ in range(20):
        for turn in distiller.turns(nets, batch):
            assert set(turn["student"]) == {"task", "attention"}
            losses.append(turn["student"]["attention"].item())
            play(turn, optimizers)
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(DistillError, match="same length"):
        create_distiller("example_attention_transfer", layers=["a", "b"], teacher_layers=["b"])


def test_whatever_is_broken_is_shown_by_the_list_and_harms_nothing_else(install, capsys):
    start = "from kd_plugins import Distiller\nclass Mine(Distiller):\n"
    modules = {
        "installed_by_test_p": "class Quit(BaseException): pass\nraise Quit('not here')",
        "installed_by_test_q": start + "    paper = 'a title'\n",
        "installed_by_test_r": start + "    def __init__(self): raise SystemExit('no')\n",
        "installed_by_test_s": start + "    def __init__(self, *, a: int = 1): self.a = a\n",
        "installed_by_test_t": start,
        "installed_by_test_u": "from kd_plugins import Network\nclass Mine(Network): pass\n",
    }
    names = dict(zip(("quits", "wrong", "refuses", "half"), modules, strict=False))
    entries = [f"{name} = {module}:Mine" for name, module in names.items()] + ["kd = installed_by_test_t:Mine"]
    networks = ["timm = installed_by_test_t:Mine", "torch = installed_by_test_u:Mine"]
    networks += ["some_package = installed_by_test_p:Mine", "other_package = installed_by_test_u:Mine"]
    folder = install("harmful-plugin", "0.1", modules)
    (metadata,) = folder.glob("*.dist-info")
    text = "\n".join(["[kd_plugins.distillers]", *entries, "[kd_plugins.networks]", *networks, ""])
    (metadata / "entry_points.txt").write_text(text)
    network._adapters.cache_clear()
    try:
        assert get_distiller("kd").__module__ == "kd_plugins.methods.kd"
        assert str(distribution_of("kd")).startswith("kd-plugins ")
        assert type(adapt(nn.Linear(2, 2))) is network.Network
        some = type("Some", (nn.Module,), {"__module__": "some_package.models"})
        with pytest.raises(DistillError, match=r"adapter of networks 'some_package' of harmful-plugin 0.1 .*not here"):
            adapt(some())
        other = type("Other", (nn.Module,), {"__module__": "other_package"})
        assert type(adapt(other())).__module__ == "installed_by_test_u"
    finally:
        network._adapters.cache_clear()
    assert cli(["list"]) == 0
    rows = capsys.readouterr().out.splitlines()
    shown = {name: [row for row in rows if row.startswith(name)] for name in (*names, "kd ", "networks of")}
    assert "broken: cannot load" in shown["quits"][0]
    assert "Quit: not here" in shown["quits"][0]
    assert "Expected Mine.paper to be a kd_plugins.Paper, or None, got 'a title'" in shown["wrong"][0]
    assert "SystemExit: no" in shown["refuses"][0]
    assert "does not call super().__init__()" in shown["half"][0]
    assert [("not used" in row, "harmful-plugin" in row) for row in shown["kd "]] == [(False, False), (True, True)]
    found = " | ".join(shown["networks of"])
    assert "timm of harmful-plugin 0.1: not used" in found
    assert "torch of harmful-plugin 0.1: not used" in found
    assert "some_package: broken: cannot load" in found
    assert "other_package of harmful-plugin 0.1: installed_by_test_u:Mine" in found


def test_a_list_of_entry_points_that_nobody_can_read_harms_nothing_else(install):
    folder = install("unreadable-plugin")
    (metadata,) = folder.glob("*.dist-info")
    (metadata / "entry_points.txt").write_text("[kd_plugins.distillers]\nno equals sign\n")
    assert {"kd", "nst"} <= set(list_distillers())


@pytest.mark.parametrize("name", ["mine.py:Mine", "./mine:Mine", "mine:", ":Mine"])
def test_a_file_is_named_as_a_module(name):
    with pytest.raises(
        DistillError, match="expected module:Class, such as my_method:LogitMatch of a file my_method.py"
    ):
        get_distiller(name)
