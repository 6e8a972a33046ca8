"""patch and unpatch: which references are swapped, what is pickled, and what works without the libraries."""

import copy
import importlib
import inspect
import io
import pickle
import re
import subprocess
import sys
import textwrap
from types import ModuleType

import plain_interop
import pytest
import torch
from originals import original
from torch import nn
from torch.nn import functional as F

from sslfast import interop

X, Y = (F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(i)), dim=1) for i in (1, 2))
SCALE = torch.tensor(3.0)
LEAF = X.clone().requires_grad_()
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def averaged(ema):
    ema.update(nn.Linear(3, 2))
    return ema.module.weight.sum()


# library: {imported name: (of an instance, of its value)}
PML = "pytorch_metric_learning.losses"
CLASSES = {
    "lightly": {
        "lightly.loss.NTXentLoss": (lambda k: k(0.3, (16, 4)), lambda f: f(LEAF, Y) + f(LEAF, X)),
        "lightly.loss.DCLLoss": (lambda k: k(0.3), lambda f: f(X, Y)),
        "lightly.loss.DCLWLoss": (lambda k: k(0.3, 0.4), lambda f: f(X, Y)),
        "lightly.loss.DINOLoss": (lambda k: k(4), lambda f: f([X, Y], [Y, X, X], epoch=1)),
    },
    "open_clip": {
        "open_clip.ClipLoss": (lambda k: k(), lambda f: f(X, Y, SCALE)),
        "open_clip.loss.SigLipLoss": (lambda k: k(), lambda f: f(X, Y, SCALE, -SCALE)),
    },
    "pytorch_metric_learning": {
        f"{PML}.NTXentLoss": (lambda k: k(0.3), lambda f: f(X, LABELS)),
        f"{PML}.SupConLoss": (lambda k: k(0.3), lambda f: f(X, LABELS)),
        f"{PML}.TripletMarginLoss": (lambda k: k(0.3), lambda f: f(X, LABELS)),
        f"{PML}.CrossBatchMemory": (
            lambda k: k(importlib.import_module(PML).NTXentLoss(), 4, 12),
            lambda f: f(X, LABELS) + f(Y, LABELS),
        ),
    },
    "sentence_transformers": {
        "sentence_transformers.losses.MultipleNegativesRankingLoss": (
            lambda k: k(nn.Linear(2, 2), scale=5.0),
            lambda f: f.compute_loss_from_embeddings([X, Y], None),
        ),
        "sentence_transformers.losses.CachedMultipleNegativesRankingLoss": (
            lambda k: k(nn.Sequential(nn.Linear(2, 2)), scale=5.0),
            lambda f: f.calculate_loss([[X], [Y]]),
        ),
    },
    "timm": {"timm.utils.ModelEmaV3": (lambda k: k(nn.Linear(3, 2), decay=0.5), averaged)},
}
FUNCTIONS = {
    "lightly": ["lightly.models.utils.update_momentum"],
    "torch": ["torch.optim.swa_utils.get_ema_multi_avg_fn"],
}
EACH_FUNCTION = pytest.mark.parametrize(
    "library, name", [(k, name) for k, names in FUNCTIONS.items() for name in names]
)
LOSSES = [(k, name) for k, names in CLASSES.items() for name in names]
EACH_CLASS = pytest.mark.parametrize("library, name", LOSSES)
CHOICES = sorted({*CLASSES, *FUNCTIONS, "transformers", "solo_learn"})


def get(name):
    """What `from module import name` gives now."""
    module, last = name.rsplit(".", 1)
    return getattr(original(module), last)


def dropin(library, name):
    return getattr(importlib.import_module(f"sslfast.interop.{library}"), name.rsplit(".", 1)[1])


def value(call, instance):
    torch.manual_seed(0)
    return call(instance).detach()


@pytest.fixture(autouse=True)
def clean():
    """Nothing stays swapped, whatever a test does."""
    assert not interop.patched()
    modules = set(sys.modules)
    yield
    for library in list(interop.patched()):
        interop.unpatch(library)
    for name in set(sys.modules) - modules:
        if name.startswith(("users_", "solo")):
            del sys.modules[name]


def script(name, *lines):
    """A loaded module of the user's with these lines."""
    module = ModuleType(f"users_{name}")
    sys.modules[module.__name__] = module
    exec("\n".join(lines), module.__dict__)
    return module


@EACH_FUNCTION
def test_every_reference_is_swapped_and_put_back(library, name):
    theirs, (module, last) = get(name), name.rsplit(".", 1)
    mine, line = dropin(library, name), f"from {module} import {last}"
    early = script("early", line, f"{line} as alias", "another = alias", f"import {module} as m")
    own = script("own", f"from sslfast.interop.{library} import {last}", f"{line} as theirs")
    home = importlib.import_module(theirs.__module__)

    assert name in interop.patch(library)
    new = get(name)
    assert new is not theirs and inspect.signature(new) == inspect.signature(mine)
    late = script("late", line, f"{line} as alias")
    inner = script("inner", f"from sslfast.interop.{library} import {last}")

    def found():
        here = [getattr(module, last) for module in (early, early.m, late)]
        here += [early.alias, early.another, late.alias, own.theirs, get(name)]
        return [*here, getattr(home, theirs.__name__)]

    assert all(x is new for x in found())
    data = pickle.dumps(new)
    interop.unpatch(library)
    assert all(x is theirs for x in [*found(), pickle.loads(data)]) and b"sslfast" not in data
    assert getattr(own, last) is mine and getattr(inner, last) is mine and dropin(library, name) is mine


@EACH_CLASS
def test_methods_are_swapped_and_put_back(library, name):
    """The class stays; instances from before, of while and of after it give the same value."""
    make, call = CLASSES[library][name]
    theirs, mine, last = get(name), dropin(library, name), name.rsplit(".", 1)[1]
    before = dict(vars(theirs))
    own = {k for k, f in vars(mine).items() if inspect.isfunction(f) and not k.startswith("__")}
    torch.manual_seed(3)
    early = make(theirs)
    expected = value(call, copy.deepcopy(early))

    swapped = interop.patch(library)
    assert get(name) is theirs and theirs.__init__ is before.get("__init__", theirs.__init__)
    assert all(vars(theirs)[k] is vars(mine)[k] for k in own)
    assert f"{theirs.__module__}.{theirs.__name__}" in swapped and own or last == "DCLWLoss"  # it inherits
    torch.manual_seed(3)
    late = make(theirs)
    for instance in (early, late):
        assert type(instance) is theirs
        torch.testing.assert_close(value(call, copy.deepcopy(instance)), expected, rtol=1e-5, atol=1e-6)

    interop.unpatch(library)
    assert dict(vars(theirs)) == before
    for instance in (early, late):
        torch.testing.assert_close(value(call, instance), expected, rtol=1e-5, atol=1e-6)


def state(library):
    """What a library's names give: functions, and what classes consist of."""
    names = [n for group in (CLASSES, FUNCTIONS) for n in group.get(library, ())]
    found = {name: get(name) for name in names}
    return {name: dict(vars(x)) if isinstance(x, type) else x for name, x in found.items()}


@pytest.mark.parametrize("library", [*CLASSES, "torch"])
def test_names_and_idempotence(library):
    before = state(library)
    assert interop.unpatch(library) is None  # there is nothing to undo
    first = interop.patch(library)
    assert isinstance(first, list)
    assert {x.rsplit(".", 1)[1] for x in first} >= {n.rsplit(".", 1)[1] for n in before} - {"DCLWLoss"}
    assert all(x.startswith(f"{library}.") for x in first) and len(set(first)) == len(first)
    once = state(library)
    assert library in interop.patched() and all(
        (once[k] == before[k]) == k.endswith("DCLWLoss") for k in before
    )
    assert interop.patch(library) == first
    assert state(library) == once and list(interop.patched()).count(library) == 1
    interop.unpatch(library)
    assert state(library) == before and library not in interop.patched()
    interop.unpatch(library)
    assert state(library) == before
    assert interop.patch(library) == first and state(library) == once or library in FUNCTIONS


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    return file.getvalue()


@EACH_CLASS
@pytest.mark.parametrize("first", [True, False], ids=["patched when written", "patched when read"])
def test_instances_are_written_as_the_originals(library, name, first):
    make, call = CLASSES[library][name]
    theirs = get(name)
    try:
        saved(make(theirs))
    except Exception as error:
        pytest.skip(f"the original cannot be written: {error}")
    if first:
        interop.patch(library)
    instance = make(get(name))
    pickled, file, other = pickle.dumps(instance), saved(instance), copy.deepcopy(instance)
    expected = value(call, instance)
    assert type(other) is theirs and torch.equal(value(call, other), expected)
    interop.unpatch(library) if first else interop.patch(library)
    for back in (pickle.loads(pickled), torch.load(io.BytesIO(file), weights_only=False)):
        assert type(back) is theirs
        torch.testing.assert_close(value(call, back), expected, rtol=1e-5, atol=1e-6)
    assert not re.findall(rb"[\w.]*sslfast[\w.]*", pickled)


@EACH_CLASS
@pytest.mark.parametrize("style", ["super().__init__(*a, **k)", "{base}.__init__(self, *a, **k)"])
def test_users_subclasses_keep_working(library, name, style):
    """Classes made before the patch and while it is there, instances at all times: the original's value."""
    make, call = CLASSES[library][name]
    module, last = name.rsplit(".", 1)
    lines = (
        f"from {module} import {last}",
        f"class Mine({last}):",
        "    def __init__(self, *a, **k):",
        f"        {style.format(base=last)}",
        "        self.mine = 7",
    )
    get(name)
    torch.manual_seed(3)
    early = script("early", *lines)
    instances = [make(early.Mine)]
    expected = value(call, copy.deepcopy(instances[0]))
    interop.patch(library)
    late = script("late", *lines)
    for kind in (early.Mine, late.Mine):
        torch.manual_seed(3)
        instances.append(make(kind))
        torch.testing.assert_close(value(call, copy.deepcopy(instances[-1])), expected, rtol=1e-5, atol=1e-6)
    interop.unpatch(library)
    for kind in (early.Mine, late.Mine):
        torch.manual_seed(3)
        instances.append(make(kind))
    for instance in instances:
        assert instance.mine == 7
        torch.testing.assert_close(value(call, instance), expected, rtol=1e-5, atol=1e-6)


# Which modules are looked at, with the library that is always there


SWA, NAME = "torch.optim.swa_utils", "get_ema_multi_avg_fn"
LINE = f"from {SWA} import {NAME}"


def test_what_the_user_has_replaced_stays():
    early = script("early", LINE, f"{LINE} as other")
    interop.patch("torch")
    early.other = len
    interop.unpatch("torch")
    assert early.other is len and getattr(early, NAME) is get(f"{SWA}.{NAME}")


def test_libraries_are_put_back_one_by_one():
    before = state("torch"), state("timm")
    interop.patch("torch")
    interop.patch("timm")
    assert set(interop.patched()) == {"torch", "timm"}
    interop.unpatch("torch")
    assert state("torch") == before[0] and state("timm") != before[1]
    interop.unpatch("timm")
    assert state("timm") == before[1] and not interop.patched()


def test_odd_modules_are_left_alone(monkeypatch):
    asked = []

    class Lazy(ModuleType):
        def __getattr__(self, name):
            asked.append(name)
            raise RuntimeError(f"{name} is not to be loaded")

    class Slots:
        __slots__ = ()

    class Closed(ModuleType):
        def __setattr__(self, name, value):
            raise RuntimeError("not to be written")

    for name, module in {"lazy": Lazy("users_lazy"), "none": None, "slots": Slots(), "number": 3,
                         "closed": Closed("users_closed")}.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, f"users_{name}", module)
    interop.patch("torch")
    interop.unpatch("torch")
    assert not asked


@pytest.fixture
def solo(tmp_path, monkeypatch):
    """solo(files): a solo-learn of these, which is installed for the test."""
    for name in [n for n in sys.modules if n.split(".")[0] == "solo"]:
        monkeypatch.delitem(sys.modules, name)

    def install(files):
        monkeypatch.syspath_prepend(tmp_path)
        return plain_interop.install_solo(tmp_path, files)

    return install


def test_solo_learn(solo):
    names = solo(plain_interop.SOLO)
    early = script("early", *[f"from solo.losses import {what}" for what in names.values()])
    theirs = {what: getattr(early, what) for what in names.values()}
    assert set(interop.patch("solo_learn")) == {f"solo.losses.{k}.{what}" for k, what in names.items()}
    losses = importlib.import_module("solo.losses")
    for name, what in names.items():
        new = getattr(early, what)
        assert (new is theirs[what]) == (what == "DINOLoss") and new is getattr(losses, what)
        assert new is getattr(importlib.import_module(f"solo.losses.{name}"), what)
    assert early.byol_loss_func(X, X).abs() < 1e-6 and early.DINOLoss(4, 0.1, 0.1, 1, 2).epoch == 0
    interop.unpatch("solo_learn")
    assert all(getattr(early, what) is theirs[what] is getattr(losses, what) for what in names.values())


def test_solo_learn_of_another_signature(solo):
    """1.0.2 passes two views to its simclr_loss_func: a drop-in that cannot take them is not put there."""
    solo(plain_interop.OLD_SOLO)
    swapped = interop.patch("solo_learn")
    losses = importlib.import_module("solo.losses")
    assert "solo.losses.moco.moco_loss_func" in swapped and "solo.losses.nnclr.nnclr_loss_func" in swapped
    assert losses.simclr_loss_func(X, Y, 0.2) == "theirs"
    assert "solo.losses.simclr.simclr_loss_func" not in swapped


# Names, and libraries that are not there


@pytest.mark.parametrize("call", [interop.patch, interop.unpatch])
@pytest.mark.parametrize("name", ["lightning", "", "lightly.loss", "Lightly", None])
def test_unknown_name(call, name):
    with pytest.raises(ValueError) as error:
        call(name)
    assert all(choice in str(error.value) for choice in CHOICES)


@pytest.mark.parametrize("name", ["supcontrast", "moco"])
def test_collections_of_files_have_no_package(name):
    with pytest.raises(ValueError, match=f"{name}.*package"):
        interop.patch(name)
    assert not interop.patched()


def run(code):
    """The code in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LIBRARIES = [*CLASSES, "transformers", "solo"]


def test_import_loads_no_library_and_the_main_script_is_swapped():
    run(f"""
        import sys
        {LINE}
        theirs = [{NAME}]
        import sslfast
        import sslfast.interop
        assert "sslfast.interop.timm" not in sys.modules
        sslfast.interop.patch("torch")
        assert not set({LIBRARIES!r}) & sys.modules.keys()
        assert {NAME} is not theirs[0]
        {LINE} as late
        assert late is {NAME}
        sslfast.interop.unpatch("torch")
        assert {NAME} is theirs[0] is late
    """)


def test_without_the_libraries():
    run(f"""
        import importlib, sys
        import torch
        from sslfast import interop
        sys.modules.update(dict.fromkeys({LIBRARIES!r}))

        def refused(call, pip, name):
            try:
                call(name)
            except ImportError as error:
                assert "pip install" in str(error) and pip in str(error), str(error)
            else:
                raise AssertionError(name)

        for pip in ("pytorch-metric-learning", "sentence-transformers", "timm", "transformers"):
            name = pip.replace("-", "_")
            refused(importlib.import_module, pip, f"sslfast.interop.{{name}}")
            refused(interop.patch, pip, name)
        for pip in ("lightly", "open_clip_torch", "solo-learn"):
            name = pip.replace("_torch", "").replace("-", "_")
            importlib.import_module(f"sslfast.interop.{{name}}")
            refused(interop.patch, pip, name)
        assert not interop.patched()

        from sslfast.interop import lightly, moco, open_clip, solo_learn, supcontrast
        x, y = torch.randn(2, 6, 4)
        scale, bias = torch.tensor(2.0), torch.tensor(-1.0)
        losses = [
            lightly.NTXentLoss(0.2)(x, y), lightly.DCLLoss()(x, y), lightly.DCLWLoss()(x, y),
            lightly.DINOLoss(4)([x, y], [x, y], epoch=1),
            open_clip.ClipLoss()(x, y, scale), open_clip.SigLipLoss()(x, y, scale, bias),
            supcontrast.SupConLoss()(x[:, None], torch.tensor([0, 1, 0, 1, 2, 2])),
            solo_learn.nnclr_loss_func(x, y), moco.contrastive_loss(x, y, moco.MoCoQueue(4, 8).queue),
        ]
        assert all(loss.isfinite() for loss in losses)
        interop.patch("torch")
        torch.optim.swa_utils.get_ema_multi_avg_fn()([x], [y], 1)
    """)
