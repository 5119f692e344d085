"""Streams: causal attention fed frame by frame, which gives what the whole tensor would give.

A stream holds what later frames need to know of the frames before: running sums of marginal means that do not keep the
causal mode, and the means of each frame where an operator keeps it. The whole tensor is a stream with one chunk.
"""

from tensorattn.streaming.attention import AttentionStream
from tensorattn.streaming.module import ModuleStream

__all__ = ["AttentionStream", "ModuleStream"]
