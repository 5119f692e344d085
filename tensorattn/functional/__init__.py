"""The operators as functions: one file an operator or a pair of kin, one record each, registered here.

A new operator of this package is a file with its function and its `Operator`, and then a line in each of these places:
imports, names and records below; names of ``tensorattn/__init__.py``; its definition in ``testing/reference.py``; its
options in ``testing/variants.py``, from where all tests take it. What the command `attend` shows by default stands in
``cli/attend.py``. One that is not of this package needs `register_operator` alone.
"""

from tensorattn.functional.additive import ADDITIVE, TRUNCATED, additive_attention, truncated_attention
from tensorattn.functional.axial import AXIAL, axial_attention
from tensorattn.functional.cells import Cells, find_cells
from tensorattn.functional.clustered import CLUSTERED, clustered_attention
from tensorattn.functional.flattened import FLATTENED, flattened_attention
from tensorattn.functional.kao import KAO_KV, KAO_QKV, kao_kv, kao_qkv
from tensorattn.functional.kronecker import (
    KRONECKER_PRODUCT,
    KRONECKER_SUM,
    kronecker_product_attention,
    kronecker_sum_attention,
)
from tensorattn.functional.maps import attention_map
from tensorattn.functional.operator import (
    OPERATORS,
    AttentionResult,
    Claim,
    Operator,
    get_operator,
    register_operator,
)
from tensorattn.functional.softmax import merge_attention
from tensorattn.functional.summary import Needs, Summary, summarize

__all__ = [
    "OPERATORS",
    "AttentionResult",
    "Cells",
    "Claim",
    "Needs",
    "Operator",
    "Summary",
    "additive_attention",
    "attention_map",
    "axial_attention",
    "clustered_attention",
    "find_cells",
    "flattened_attention",
    "get_operator",
    "kao_kv",
    "kao_qkv",
    "kronecker_product_attention",
    "kronecker_sum_attention",
    "merge_attention",
    "register_operator",
    "summarize",
    "truncated_attention",
]

for _record in (ADDITIVE, TRUNCATED, KAO_KV, KAO_QKV, KRONECKER_PRODUCT, KRONECKER_SUM, AXIAL, CLUSTERED, FLATTENED):
    register_operator(_record)
