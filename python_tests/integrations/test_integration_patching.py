"""The mechanism, on a host made here: a package of two modules, one importing from the other."""

import importlib.metadata
import pickle
import subprocess
import sys
import types

import pytest

from ppo_kernels.integrations import _patching
from ppo_kernels.integrations._patching import Host, Replacement, UnsupportedVersionError

LOSSES = """
REGISTRY = {}

def double(x, times=2):
    return x * times

class Loss:
    def forward(self, x):
        return x + 1

class Function:
    @staticmethod
    def apply(x):
        return -x

REGISTRY["double"] = double
"""


def double(x, times=2):
    return ("ours", x * times)


def forward(self, x):
    return ("ours", _patching.original("fakehost.losses:Loss.forward")(self, x))


class Function:
    @staticmethod
    def apply(x):
        return ("ours", x)


def replacements(**changed):
    functions = {"double": double, "Loss.forward": forward, "Function": Function} | changed
    return [Replacement(f"fakehost.losses:{name}", f, "") for name, f in functions.items()]


@pytest.fixture
def fakehost(monkeypatch):
    package, losses = types.ModuleType("fakehost"), types.ModuleType("fakehost.losses")
    exec(LOSSES, vars(losses))
    losses.Loss.__module__ = losses.double.__module__ = losses.Function.__module__ = losses.__name__
    package.__path__ = []
    trainer = types.ModuleType("fakehost.trainer")
    trainer.twice, package.losses = losses.double, losses
    for module in (package, losses, trainer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.4.2")
    return types.SimpleNamespace(losses=losses, trainer=trainer)


@pytest.fixture
def host(fakehost):
    host = Host("fakehost", ["1.4"], replacements(), ["fakehost.losses:REGISTRY"])
    yield host
    host.unpatch()


def all_ours(fakehost):
    return [
        fakehost.losses.double(1) == ("ours", 2),
        fakehost.trainer.twice(1) == ("ours", 2),
        fakehost.losses.REGISTRY["double"](1, times=3) == ("ours", 3),
        fakehost.losses.Loss().forward(1) == ("ours", 2),
        fakehost.losses.Function.apply(1) == ("ours", 1),
    ]


def test_replaces_and_reports(host, fakehost):
    theirs = fakehost.losses.double
    patch = host.patch()
    assert patch.replaced == [
        "fakehost.losses.Function",
        "fakehost.losses.Loss.forward",
        "fakehost.losses.REGISTRY.double",
        "fakehost.losses.double",
        "fakehost.trainer.twice",
    ]
    assert "fakehost.trainer.twice" in repr(patch)
    assert all(all_ours(fakehost))
    host.unpatch()
    assert not any(all_ours(fakehost))
    assert theirs is fakehost.losses.double is fakehost.trainer.twice
    assert theirs is fakehost.losses.REGISTRY["double"]


def test_importers_while_patched_are_restored(host, fakehost, monkeypatch):
    theirs = fakehost.losses.double
    later, user = types.ModuleType("fakehost.later"), types.ModuleType("some_user")
    with host.patch():
        later.double, user.double = fakehost.losses.double, double
        monkeypatch.setitem(sys.modules, "fakehost.later", later)
        monkeypatch.setitem(sys.modules, "some_user", user)
    assert later.double is theirs
    assert user.double is double  # imported from us, not from the host


def test_nested(host, fakehost):
    with host.patch() as outer:
        with host.patch() as inner:
            assert inner.replaced == []
        assert all(all_ours(fakehost))
        assert outer.replaced
    assert not any(all_ours(fakehost))
    with host.patch(), host.patch():
        host.unpatch()
        assert not any(all_ours(fakehost))
    host.unpatch()


def test_ends_in_any_order(host, fakehost):
    first, second = host.patch(), host.patch()
    first.undo()
    first.undo()
    assert all(all_ours(fakehost))
    second.undo()
    assert not any(all_ours(fakehost))


def test_restores_after_an_exception(host, fakehost):
    with pytest.raises(ZeroDivisionError), host.patch():
        _ = 1 / 0
    assert not any(all_ours(fakehost))


def test_leaves_what_someone_else_put_there(host, fakehost):
    with host.patch():
        fakehost.trainer.twice = print
    assert fakehost.trainer.twice is print


@pytest.mark.parametrize("version", ["1.40", "1.3.9", "2.0"])
def test_refuses_unknown_versions(host, fakehost, monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(UnsupportedVersionError, match=rf"fakehost {version} .* tested are 1\.4"):
        host.patch()
    assert not any(all_ours(fakehost))
    with host.patch(untested_version=True):
        assert all(all_ours(fakehost))


def test_refuses_other_signatures_before_anything_is_replaced(fakehost):
    def other(x, times=3):
        """Another default."""

    host = Host("fakehost", ["1.4"], [*replacements(), *replacements(double=other)])
    with pytest.raises(UnsupportedVersionError, match=r"double .* takes \(x, times=2\), .*times=3"):
        host.patch(untested_version=True)
    host = Host("fakehost", ["1.4"], replacements(halve=double))
    with pytest.raises(UnsupportedVersionError, match=r"no fakehost\.losses:halve"):
        host.patch()
    assert not any(all_ours(fakehost))


def test_refuses_absent_hosts():
    with pytest.raises(ImportError, match="nosuchhost is not installed"):
        Host("nosuchhost", ["1"], []).patch()


def test_replaced_functions_pickle_by_the_hosts_name(host, fakehost):
    with host.patch():
        data = pickle.dumps(fakehost.losses.double)
        assert pickle.loads(data)(2) == ("ours", 4)
    assert pickle.loads(data) is fakehost.losses.double


def test_importing_the_integrations_imports_no_host_and_changes_nothing():
    names = ("trl", "verl", "openrlhf", "torchrl", "transformers", "ray")
    code = (
        "import os, sys\n"
        "from ppo_kernels.integrations import openrlhf, torchrl, trl, verl\n"
        "import ppo_kernels.integrations.verl.plugin\n"
        f"print([name for name in {names} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
