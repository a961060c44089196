"""Replaces functions of another package by ours wherever they are held, and puts them back."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Replacement(NamedTuple):
    """One function of the host and ours in its place.

    `target` is "module:name" or "module:Class.method". `calls` names the public functions behind
    `function`, `changes` says what is not as in the host; both are for the documentation. Where the
    target has no signature of its own, `signature_of` is the method that has it.
    """

    target: str
    function: Callable[..., Any]
    calls: str
    changes: str = ""
    signature_of: str | None = None


_originals: dict[str, Any] = {}  # of everything that is patched now


def original(target: str) -> Any:
    """The host's own function, patched or not."""
    return _originals[target] if target in _originals else _resolve(target)[2]


class UnsupportedVersionError(RuntimeError):
    """The installed host is not one that the replacements were made for."""


class Patch:
    """What one `patch()` did; as a context manager it is undone at the end."""

    def __init__(self, host: Host, replaced: list[str]) -> None:
        self._host = host
        self.replaced = replaced

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        lines = [f"{self._host.package}: {len(self.replaced)} places now hold ppo_kernels'"]
        return "\n  ".join(lines + self.replaced)

    def undo(self) -> None:
        """Ends this patch; the host's functions are back once all patches of it have ended."""
        self._host.release(self)


class Host:
    """Another package, and what is replaced in it.

    `versions` are the tested releases, as prefixes; `registries` dicts ("module:name") that hold
    functions too.
    """

    def __init__(
        self,
        package: str,
        versions: Sequence[str],
        replacements: Sequence[Replacement],
        registries: Sequence[str] = (),
    ) -> None:
        self.package = package
        self.versions = tuple(versions)
        self.replacements = tuple(replacements)
        self._registries = tuple(registries)
        self._stand_ins: dict[str, Any] = {}
        self._patches: list[Patch] = []

    def patch(self, *, untested_version: bool = False) -> Patch:
        """Puts our functions in the place of the host's, everywhere in this process.

        Modules that imported one by name are found and changed as well; later imports get ours. A
        second call changes nothing more, but both must end before the host's are back.

        Args:
            untested_version: Patch a release that is not among the tested ones. Signatures that
                differ are refused all the same.

        Returns:
            What was replaced (`.replaced`, printable), and a context manager that puts it back.

        Raises:
            ImportError: The host, or a module of it, cannot be imported.
            UnsupportedVersionError: It is not a tested release, or not one with these functions.
        """
        replaced: list[str] = []
        if not self._patches:
            self._check_version(untested_version)
            originals = {r.target: self._checked_original(r) for r in self.replacements}
            stand_ins = {
                r.target: _stand_in(r.function, originals[r.target]) for r in self.replacements
            }
            _originals.update(originals)
            self._stand_ins = stand_ins
            replaced = self._exchange(originals, stand_ins)
        patch = Patch(self, replaced)
        self._patches.append(patch)
        return patch

    def unpatch(self) -> None:
        """Puts the host's functions back, whatever patches are still open."""
        for patch in list(self._patches):
            self.release(patch)

    def release(self, patch: Patch) -> None:
        """Ends one patch; nothing happens if it has ended before."""
        if patch not in self._patches:
            return
        self._patches.remove(patch)
        if not self._patches:
            self._exchange(self._stand_ins, _originals)
            for target in self._stand_ins:
                del _originals[target]

    def _check_version(self, untested_version: bool) -> None:
        try:
            version = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(f"patch: {self.package} is not installed") from None
        tested = any((version + ".").startswith(prefix + ".") for prefix in self.versions)
        if not tested and not untested_version:
            raise UnsupportedVersionError(
                f"patch: {self.package} {version} is installed, tested are "
                f"{', '.join(self.versions)}; untested_version=True patches it all the same, where "
                "the signatures are as expected"
            )

    def _checked_original(self, replacement: Replacement) -> Any:
        target = replacement.target
        try:
            original = _resolve(target)[2]
            if replacement.signature_of is None:
                theirs = _parameters(_callable(original))
            else:
                theirs = _parameters(_resolve(replacement.signature_of)[2])[1:]
        except AttributeError as error:
            raise UnsupportedVersionError(
                f"patch: this {self.package} has no {target}: {error}"
            ) from None
        ours = _parameters(_callable(replacement.function))
        if ours != theirs:
            raise UnsupportedVersionError(
                f"patch: {target} of this {self.package} takes ({_spelled(theirs)}), "
                f"expected ({_spelled(ours)})"
            )
        return original

    def _exchange(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
        """`new` wherever `old` is held; returns where that was."""
        replaced = []
        for target in old:
            owner, name, held = _resolve(target)
            if isinstance(owner, type) and held is old[target]:
                setattr(owner, name, new[target])
                replaced.append(f"{owner.__module__}.{owner.__qualname__}.{name}")
        exchanged = {id(old[target]): new[target] for target in old}
        for where, namespace in (*_modules(), *self._registry_dicts()):
            for name, value in list(namespace.items()):
                if id(value) in exchanged:
                    namespace[name] = exchanged[id(value)]
                    replaced.append(f"{where}.{name}")
        return sorted(replaced)

    def _registry_dicts(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for registry in self._registries:
            yield registry.replace(":", "."), _resolve(registry)[2]


def _resolve(target: str) -> tuple[Any, str, Any]:
    """Who holds it, under what name, and it."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    return owner, name, getattr(owner, name)


def _modules() -> Iterator[tuple[str, dict[str, Any]]]:
    """All but our own, which keep what they are."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, types.ModuleType) and name.split(".")[0] != "ppo_kernels":
            yield name, vars(module)


def _callable(function: Any) -> Any:
    """An autograd.Function is called by `apply`."""
    return getattr(function, "apply", function)


def _parameters(function: Callable[..., Any]) -> list[tuple[str, str, Any]]:
    signature = inspect.signature(function)
    return [(p.name, p.kind.name, p.default) for p in signature.parameters.values()]


def _spelled(parameters: list[tuple[str, str, Any]]) -> str:
    return ", ".join(
        name if default is inspect.Parameter.empty else f"{name}={default!r}"
        for name, _, default in parameters
    )


def _stand_in(function: Any, original: Any) -> Any:
    """A copy of ours, so that putting back finds what was put there and nothing else.

    It bears the host's name: what is pickled by reference is found in the host.
    """
    module = getattr(original, "__module__", function.__module__)
    if isinstance(function, type):
        return type(original.__name__, (function,), {"__module__": module})
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__, copy.__doc__ = function.__annotations__, function.__doc__
    copy.__module__ = module
    copy.__qualname__ = getattr(original, "__qualname__", function.__qualname__)
    return copy
