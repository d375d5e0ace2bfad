"""Let torchvision's wheel for CUDA be imported beside torch's wheel for CPU. On the path of tests alone.

PyPI's torchvision links against CUDA. Where its library does not load, its import fails at the fake kernels of two
operators; their schemas are enough for it, and image transforms are Python.
"""

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path


class _DefineMissingOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            spec = importlib.machinery.PathFinder.find_spec(fullname, path)
            if spec is not None:
                _define(Path(spec.origin).parent)
        return None


def _define(folder):
    import torch

    try:
        for library in folder.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# Python runs this file where its folder is on the path at the start, and `conftest.py` in any case.
if not any(type(finder).__name__ == _DefineMissingOperators.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _DefineMissingOperators())
