"""Attention over tensors of any order, without flattening them."""
from tensorattn.averages import *
from tensorattn.functional import *
from tensorattn.functional import OPERATORS
