"""OpenRLHF's modules without what they import for GPUs and clusters, which is stubbed.

Not one of the functions under test uses a stub; their modules only import them.
"""

import importlib.abc
import importlib.machinery
import sys
import types

STUBBED = {
    "aiohttp", "bitsandbytes", "deepspeed", "einops", "flash_attn", "loralib", "optimum", "peft",
    "pylatexenc", "pynvml", "ray", "ring_flash_attn", "torchdata", "vllm", "wandb",
}  # fmt: skip


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in STUBBED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = _stub
        return module

    def exec_module(self, module):
        pass


def _stub(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name == "remote":  # a decorator, with or without arguments
        return lambda *args, **_: args[0] if args else lambda decorated: decorated
    return type(name, (), {})


def load():
    """The modules loss, utils and experience_maker; the stubs are forgotten again."""
    import transformers.integrations.deepspeed  # noqa: F401  looks for the real one

    kept = {name: m for name, m in sys.modules.items() if name.split(".")[0] in STUBBED}
    for name in kept:
        del sys.modules[name]
    stubs = _Stubs()
    sys.meta_path.insert(0, stubs)
    try:
        from openrlhf.models import loss, utils
        from openrlhf.trainer.ppo_utils import experience_maker
    finally:
        sys.meta_path.remove(stubs)
        for name in [name for name in sys.modules if name.split(".")[0] in STUBBED]:
            del sys.modules[name]
        sys.modules.update(kept)
    return loss, utils, experience_maker
