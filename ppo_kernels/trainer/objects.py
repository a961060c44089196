"""Objects that settings name as 'module:name'."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from ppo_kernels.trainer.config import InputError


def import_object(spec: str, key: str) -> Any:
    """Return what 'module:name' or 'path/to/file.py:name' names; errors name the setting `key`."""
    module_name, _, name = spec.rpartition(":")
    if not module_name or not name:
        raise InputError(f"{key}: given {spec!r}, expected 'module:name' or 'file.py:name'")
    try:
        if module_name.endswith(".py"):
            module = _import_file(Path(module_name))
        else:
            module = importlib.import_module(module_name)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise InputError(f"{key}: given {spec!r}, which does not import: {error}") from error
    if not hasattr(module, name):
        raise InputError(f"{key}: given {spec!r}, but {module_name} has no {name!r}")
    found = getattr(module, name)
    if not callable(found):
        raise InputError(f"{key}: given {spec!r}, a {type(found).__name__}, expected a callable")
    return found


def _import_file(path: Path) -> Any:
    name = f"_ppo_kernels_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
