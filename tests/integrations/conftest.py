"""Makes torchvision importable where its operators were built for another torch: timm needs it, but none of them."""

import importlib
import importlib.util
import sys
import warnings

import torch

if importlib.util.find_spec("timm") is not None and importlib.util.find_spec("torchvision") is not None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("torchvision")
    except RuntimeError:
        for name in [each for each in sys.modules if each.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        LIBRARY = torch.library.Library("torchvision", "DEF")
        for schema in ("nms(Tensor d, Tensor s, float t) -> Tensor", "qnms(Tensor d, Tensor s, float t) -> Tensor"):
            LIBRARY.define(schema)
