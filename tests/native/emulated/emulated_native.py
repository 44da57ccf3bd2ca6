"""A pytest plugin (`-p emulated_native`): `vila2._C` becomes the one in the folder that VILA2_EMULATED names."""

import importlib.util
import os
import sys
from pathlib import Path

import vila2

(_FILE,) = Path(os.environ["VILA2_EMULATED"]).glob("_C.*")
_SPEC = importlib.util.spec_from_file_location("vila2._C", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
sys.modules["vila2._C"] = _MODULE
vila2._C = _MODULE
