"""The theorems behind the laws, a file a subject: what the operators, averages, summaries and laws are made of.

Each is tried on a namespace with the names of the package, by default the package itself: ``ta`` in these files.
"""

from tensorattn.testing.check import Law
from tensorattn.testing.theorems.averages import additive_parts, adjoint, joint_repetition
from tensorattn.testing.theorems.bounds import (
    bounded,
    box,
    exclusive_or,
    rank,
    saturated,
    second_order_bound,
    speed,
    speed_of_products,
)
from tensorattn.testing.theorems.clusters import all_columns, cropping, distinct_keys, large_cells
from tensorattn.testing.theorems.exactness import (
    additive_keys,
    all_modes,
    causal_exact,
    decomposed_bias,
    degenerate_laws,
    groups_as_modes,
    independent_groups,
    missing_interaction,
    orthogonal_channels,
    orthogonal_outer_sums,
    overlapping_groups,
    symmetric_modes,
)
from tensorattn.testing.theorems.gradients import additive_gradients, layers, mass, projected_gradients
from tensorattn.testing.theorems.limits import decay, far_away, first_orders, homogeneous_noise, orders_of_the_error
from tensorattn.testing.theorems.softmaxes import (
    arithmetic_marginals,
    counted_once,
    geometric_marginals,
    joint_shares,
    ladder,
    outer_sums,
    projection,
)
from tensorattn.testing.theorems.summaries import merging, projecting
from tensorattn.testing.theorems.tensor_normal import gls_averages, laws_of_averages

__all__ = ["THEOREMS"]

THEOREMS: tuple[Law, ...] = (
    *(
        independent_groups,
        all_modes,
        groups_as_modes,
        overlapping_groups,
        additive_keys,
        missing_interaction,
        degenerate_laws,
        orthogonal_channels,
        orthogonal_outer_sums,
        symmetric_modes,
        decomposed_bias,
        causal_exact,
    ),
    *(counted_once, outer_sums, ladder, joint_shares, geometric_marginals, projection, arithmetic_marginals),
    *(bounded, exclusive_or, second_order_bound, saturated, speed, speed_of_products, box, rank),
    *(additive_gradients, mass, projected_gradients, layers),
    *(first_orders, orders_of_the_error, decay, homogeneous_noise, far_away),
    *(adjoint, additive_parts, joint_repetition),
    *(merging, projecting),
    *(laws_of_averages, gls_averages),
    *(distinct_keys, cropping, all_columns, large_cells),
)
