"""Values that several verbs' options take."""

from __future__ import annotations

from typing import Literal

DType = Literal["float32", "float16", "bfloat16"]
Format = Literal["peft", "kohya"]
