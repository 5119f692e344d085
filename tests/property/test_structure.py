"""What the operators are made of: decompositions, bounds, derivatives and limits of single operators."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.special import logsumexp

import tensorattn as ta
from tensorattn.stats import TensorNormal
from tensorattn.testing import (
    Subject,
    additive_tensors,
    allowed,
    batch_sizes,
    cases,
    check_equals_flattened_on_additive,
    mode_sizes,
    queries,
    resolve,
    tensor_normals,
    weights,
)
from tensorattn.testing.cases import Case, rows
from tensorattn.testing.checks.derivatives import along_queries, expect_slope, marginal_covariance
from tensorattn.testing.drawing import generators, numbers
from tensorattn.testing.tolerances import exact, largest

TOLD = Subject("theorem", lambda: None)  # compares, and tells a failure with its case


def close(got, expected, tolerance, statement, case):
    TOLD.expect_close(got, expected, tolerance, statement, case)


def called(operator, case, **how):
    given = {"order": case.order, "scale": case.scale, "weights": case.weights, **how}
    return operator(case.query, case.key, case.value, **given)


def for_queries(case, mean):
    """Give ``(*batch, D_v)`` one dimension for each of the query's positions."""
    return mean.reshape(*case.batch, *(1 for _ in case.positions), mean.shape[-1])


def grand_mean(case):
    """The weighted mean value, with the positions of the queries."""
    summary = ta.summarize(case.value, case.value, order=case.order, kept=[()], weights=case.weights)
    return for_queries(case, summary.value(()))


def with_grad(case):
    """The case with leaves for arguments."""
    leaves = [t.detach().clone().requires_grad_() for t in (case.query, case.key, case.value)]
    return case.replace(query=leaves[0], key=leaves[1], value=leaves[2]), leaves


# The joint softmax.


@given(cases())
def test_the_joint_softmax_is_the_mean_value_plus_a_share_of_each_mode(case):
    """J = v̄ + Σ_m λ_m d_m with the shares λ_m of the normaliser, which add up to one."""
    output, _, attention = called(ta.kao_kv, case, return_attention=True)
    _, _, separate = called(ta.additive_attention, case, return_attention=True)
    means = ta.mode_averages(case.value, order=case.order, weights=case.weights)
    batch = len(case.batch)
    shares = [part.sum(-1, keepdim=True) for part in attention]
    center = grand_mean(case)
    total = center.expand_as(output)
    for share, own, mean in zip(shares, separate, means, strict=True):
        effect = (rows(own, batch) @ mean).reshape(output.shape) - center
        total = total + share * effect
    close(output, total, case.allowed(), "the joint softmax is a share of each mode's effect", case)
    close(sum(shares), torch.ones_like(shares[0]), case.allowed_lse, "the shares add up to one", case)


@given(cases())
def test_the_attention_weights_make_the_output(case):
    """The sum over modes of attention weights times mean values, less N - 1 mean values, is the additive output."""
    output, _, attention = called(ta.additive_attention, case, return_attention=True)
    means = ta.mode_averages(case.value, order=case.order, weights=case.weights)
    parts = [(rows(p, len(case.batch)) @ v).reshape(output.shape) for p, v in zip(attention, means, strict=True)]
    expected = sum(parts) - (case.order - 1) * grand_mean(case)
    close(output, expected, case.allowed(largest(output)), "attention weights make the output", case)
    for part in attention:
        close(part.sum(-1), torch.ones(part.shape[:-1]), case.allowed_lse, "attention weights sum to one", case)


@given(cases(weighted=False))
def test_the_attention_to_each_mode_is_the_geometric_marginal_of_full_attention(case):
    """The weight of an index is the geometric mean of full attention over its slice, normalised, on any data."""
    (full,) = called(ta.flattened_attention, case, return_attention=True).attention
    assume(case.logit < 300)  # weights of full attention that are not zero in float64
    log = exact(full).log().reshape(*case.query.shape[:-1], *case.sizes).numpy()
    for mode, part in enumerate(called(ta.additive_attention, case, return_attention=True).attention):
        others = tuple(axis - case.order for axis in range(case.order) if axis != mode)
        marginal = log.mean(others) if others else log
        expected = np.exp(marginal - logsumexp(marginal, axis=-1, keepdims=True))
        close(part, expected, case.allowed_lse, "attention to a mode is a geometric marginal", case)


# Bounds.


@given(cases())
def test_the_additive_output_lies_in_the_box_of_its_modes(case):
    """Between the sums over modes of the smallest and largest mean values, less N - 1 times the mean value."""
    output = called(ta.additive_attention, case)
    low = high = -(case.order - 1) * grand_mean(case)
    for mode, mean in enumerate(ta.mode_averages(case.value, order=case.order, weights=case.weights)):
        absent = case.mode_weights(mode).unsqueeze(-1) == 0
        low = low + for_queries(case, mean.masked_fill(absent, math.inf).amin(-2))
        high = high + for_queries(case, mean.masked_fill(absent, -math.inf).amax(-2))
    inside = output.clamp(low.expand_as(output), high.expand_as(output))
    close(output, inside, case.allowed(largest(output)), "the output lies in the box of its modes", case)


def diameter(tokens):
    """Largest distance between two of some tokens ``(*batch, S, D)``."""
    return torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist").amax((-2, -1))


@given(cases(weighted=False), st.data())
def test_outputs_move_no_faster_than_a_quarter_of_the_scale_times_the_diameters(case, data):
    """The Lipschitz constant in the query: s/4 · D(K) D(V) of all averages, or summed over the modes."""
    step = 10.0 ** data.draw(st.integers(-3, 1)) * numbers(data.draw(generators(5)), case.query.shape)
    moved = case.replace(query=case.query + step)
    keys, values = (ta.mode_averages(t, order=case.order) for t in (case.key, case.value))
    joint = diameter(torch.cat(keys, -2)) * diameter(torch.cat(values, -2))
    separate = sum(diameter(k) * diameter(v) for k, v in zip(keys, values, strict=True))
    for operator, bound in ((ta.kao_kv, joint), (ta.additive_attention, separate)):
        change = (called(operator, moved) - called(operator, case)).norm(dim=-1)
        reach = case.factor / 4 * for_queries(case, bound.unsqueeze(-1)).squeeze(-1) * step.norm(dim=-1)
        excess = (change - reach).clamp(min=0.0)
        tolerance = max(case.allowed(largest(moved.value)), moved.allowed()) + 1e-9 * largest(reach)
        close(excess, torch.zeros_like(excess), tolerance, "the output is Lipschitz in the query", case)


# Outer sums.


@given(cases(on_grid=True), st.booleans())
def test_outputs_of_averaged_queries_are_additive(case, centered):
    output = called(ta.kao_qkv, case, centered=centered)
    residual = ta.interaction_residual(output, order=case.order)
    tolerance = allowed("average", case.dtype, magnitude=2 * case.order * largest(output))
    close(residual, torch.zeros_like(residual), tolerance, "the output is an outer sum", case)


# Derivatives.


@given(cases(weighted=False))
def test_gradients_of_keys_and_values_are_additive(case):
    """What averages cannot see gets no gradient: the gradient of keys and values is a sum of one term a mode."""
    for operator in (ta.additive_attention, ta.kao_kv):
        leafy, (_, key, value) = with_grad(case)
        called(operator, leafy).square().sum().backward()
        for leaf in (key, value):
            residual = ta.interaction_residual(leaf.grad, order=case.order)
            tolerance = allowed("average", case.dtype, magnitude=2 * case.order * largest(leaf.grad))
            close(residual, torch.zeros_like(residual), tolerance, "the gradient is additive", case)


@given(cases(), st.data())
def test_gradients_conserve_mass(case, data):
    """Over all positions, gradients of the keys add up to zero and those of the values to that of the output."""
    cotangent = numbers(data.draw(generators(5)), (*case.query.shape[:-1], case.value.shape[-1]))
    dims = [len(case.batch) + mode for mode in range(case.order)]
    places = [len(case.batch) + place for place in range(len(case.positions))]
    arriving = cotangent.sum(places) if places else cotangent
    size = float(cotangent.abs().sum())
    for operator in (ta.additive_attention, ta.kao_kv, ta.flattened_attention):
        leafy, (query, key, value) = with_grad(case)
        called(operator, leafy).backward(cotangent)
        tolerance = allowed("gradient", case.dtype, logit=case.logit, magnitude=size * (1 + case.magnitude))
        close(value.grad.sum(dims), arriving, tolerance, "gradients of the values add up to that of the output", case)
        tolerance *= abs(case.factor) * largest(query) * case.order
        mass = key.grad.sum(dims)
        close(mass, torch.zeros_like(mass), tolerance, "gradients of the keys add up to zero", case)


@given(cases(), st.data())
def test_to_first_order_the_additive_operator_has_the_covariances_of_its_modes(case, data):
    """At scale zero the derivative of the additive output by the scale is Σ_m Cov_m q, that of full attention C q."""
    covariance = sum(marginal_covariance(case, (mode,)) for mode in range(case.order))
    slope = along_queries(case, covariance)
    expect_slope(resolve("additive", {}), case, slope, data.draw, "the slope is that of the modes")


@given(cases(), st.data())
def test_to_first_order_the_joint_softmax_has_the_mean_covariance_of_its_modes(case, data):
    """At scale zero the derivative of the joint softmax by the scale is Σ_m (n_m / S) Cov_m q, weights counted."""
    counts = [case.mode_weights(mode).sum(-1)[..., None, None] for mode in range(case.order)]
    parts = [count * marginal_covariance(case, (mode,)) for mode, count in enumerate(counts)]
    slope = along_queries(case, sum(parts) / sum(counts))
    expect_slope(resolve("kao_kv", {}), case, slope, data.draw, "the slope is a mean over modes")


# The module.


@st.composite
def layers(draw):
    """An additive layer and a flattened one with equal parameters, and an additive input with weights."""
    sizes = draw(mode_sizes(max_positions=24))
    heads, channels_first = draw(st.integers(1, 3)), draw(st.booleans())
    channels = heads * draw(st.integers(1, 3))
    batch = draw(st.integers(1, 2))
    x = draw(additive_tensors(sizes, batch=(batch,), dim=channels))
    generator = draw(generators(7))
    pair = [
        ta.TensorAttention(
            channels, heads, modes=len(sizes), operator=name, channels_first=channels_first, dtype=torch.float64
        )
        for name in ("additive", "flattened")
    ]
    with torch.no_grad():
        for parameter in pair[0].parameters():
            parameter.copy_(numbers(generator, parameter.shape))
    pair[1].load_state_dict(pair[0].state_dict())
    return *pair, x.movedim(-1, 1) if channels_first else x, draw(weights(sizes, batch=(batch,)))


@given(layers())
def test_a_layer_on_an_additive_input_is_full_self_attention_and_learns_like_it(drawn):
    """Outputs are equal, and so are the gradients of all parameters; that of the input is, up to interactions."""
    additive, flattened, x, given_weights = drawn
    order, channels = additive.modes.order, additive.embed_dim
    y = x.movedim(1, -1) if additive.channels_first else x
    project = {name: getattr(additive, name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    q, k, v = (project[name](y).detach() for name in ("q_proj", "k_proj", "v_proj"))
    logit = largest(q.norm(dim=-1)) * largest(k.norm(dim=-1))
    gain = 1 + channels * largest(project["out_proj"].weight)
    leaves = [x.detach().clone().requires_grad_() for _ in range(2)]
    outputs = [m(leaf, weights=given_weights) for m, leaf in zip((additive, flattened), leaves, strict=True)]
    case = Case(q, k, v, order, weights=given_weights)
    tolerance = allowed("output", torch.float64, logit=logit, magnitude=gain * largest(v))
    close(outputs[0], outputs[1], tolerance, "the layer is full self-attention", case)

    cotangent = torch.linspace(-1, 1, outputs[0].numel(), dtype=torch.float64).reshape(outputs[0].shape)
    for output in outputs:
        output.backward(cotangent)
    sizes = [1 + largest(p.grad) for p in flattened.parameters()] + [1 + largest(leaves[1].grad)]
    path = (1 + largest(x)) * gain * (1 + largest(v)) * (1 + channels * largest(*flattened.parameters())) ** 2
    tolerance = allowed("gradient", torch.float64, logit=logit, magnitude=max(*sizes, path))
    for (name, ours), theirs in zip(additive.named_parameters(), flattened.parameters(), strict=True):
        close(ours.grad, theirs.grad, tolerance, f"the gradient of {name} is that of full attention", case)


@given(cases(additive=True, weighted=False))
def test_on_additive_data_gradients_agree_with_full_attention_up_to_interactions(case):
    gradients = []
    for operator in (ta.additive_attention, ta.flattened_attention):
        leafy, leaves = with_grad(case)
        called(operator, leafy).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    (query, *ours), (full_query, *theirs) = gradients
    size = max(map(largest, theirs)) + largest(full_query) + case.magnitude**2
    tolerance = allowed("gradient", case.dtype, logit=case.logit, magnitude=(1 + size) * (1 + largest(case.query)))
    close(query, full_query, tolerance, "the gradient of the query is that of full attention", case)
    for left, right in zip(ours, theirs, strict=True):
        statement = "the gradient of keys and values is the additive part of that of full attention"
        close(left, ta.additive_part(right, order=case.order), tolerance, statement, case)


# Tensor-normal laws.


@st.composite
def normal_cases(draw, dtype=torch.float64):
    """Keys and values that are samples of sums of tensor-normal laws with all-ones factors in all modes but one."""
    sizes, batch = draw(mode_sizes(max_positions=48)), draw(batch_sizes(max_size=2))
    dim = draw(st.integers(1, 4))
    key = draw(tensor_normals(sizes, batch=batch, dim=dim, dtype=dtype, stream=1))
    value = draw(tensor_normals(sizes, batch=batch, dim=draw(st.integers(1, 4)), dtype=dtype, stream=2))
    query = draw(queries(sizes, batch=batch, dim=dim, dtype=dtype))
    return Case(query, key, value, len(sizes), 0.3, draw(weights(sizes, batch=batch)))


@given(normal_cases())
def test_samples_of_normal_laws_with_perfect_correlation_along_all_modes_but_one_are_attended_to_exactly(case):
    check_equals_flattened_on_additive.law(resolve("additive", {}), case, None)


@given(mode_sizes(max_positions=48), st.integers(1, 3), st.integers(0, 2**16), st.data())
def test_samples_of_the_library_s_tensor_normal_law_are_too(sizes, dim, seed, data):
    generator = torch.Generator().manual_seed(seed)
    mode = data.draw(st.integers(0, len(sizes) - 1))

    def covariance(size):
        root = numbers(generator, (size, size))
        return root @ root.mT + 0.1 * torch.eye(size)

    factors = [covariance(n) if m == mode else torch.ones(n, n).double() for m, n in enumerate(sizes)]
    law = functools.partial(TensorNormal, torch.zeros(*sizes, dim).double(), factors)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        key, value = (law(covariance(dim)).sample() for _ in range(2))
    query = data.draw(queries(sizes, dim=dim))
    check_equals_flattened_on_additive.law(resolve("additive", {}), Case(query, key, value, len(sizes), 0.3), None)


# Limits.


@given(cases(weighted=False))
def test_far_away_every_softmax_picks_its_best_token(case):
    """At a huge scale: the best index of every mode for the additive output, the best average of all for the joint."""
    keys, values = (ta.mode_averages(t, order=case.order) for t in (case.key, case.value))
    batch, scale = len(case.batch), 1e6
    query = rows(case.query, batch)

    def best(key, value):
        logits = query @ key.mT
        top = logits.topk(min(2, logits.shape[-1])).values
        assume(top.shape[-1] < 2 or float((top[..., 0] - top[..., 1]).min()) * scale > 100)
        index = logits.argmax(-1, keepdim=True).expand(*logits.shape[:-1], value.shape[-1])
        return torch.take_along_dim(value, index, -2)

    far = case.replace(scale=scale)
    joint = best(torch.cat(keys, -2), torch.cat(values, -2))
    # Averages of the values have rounding errors of their own, and of the logits only the order counts.
    tolerance = allowed("output", case.dtype, magnitude=case.magnitude)
    close(rows(called(ta.kao_kv, far), batch), joint, tolerance, "the joint softmax picks one average", case)
    single = sum(best(k, v) for k, v in zip(keys, values, strict=True))
    expected = single - (case.order - 1) * rows(grand_mean(case).expand(*case.query.shape[:-1], -1), batch)
    tolerance *= case.order
    close(rows(called(ta.additive_attention, far), batch), expected, tolerance, "each mode picks one index", case)


# Symmetry.


@given(
    cases(order=2, on_grid=True, weighted=False, max_positions=16), st.sampled_from(["additive", "kao_kv", "kao_qkv"])
)
def test_a_tensor_symmetric_in_two_modes_has_a_symmetric_output(case, name):
    size = min(case.sizes)
    batch = len(case.batch)

    def symmetric(tensor):
        tensor = tensor.narrow(batch, 0, size).narrow(batch + 1, 0, size)
        return tensor + tensor.transpose(batch, batch + 1)

    twin = case.replace(query=symmetric(case.query), key=symmetric(case.key), value=symmetric(case.value))
    output = resolve(name, {}).output(twin)
    close(output, output.transpose(batch, batch + 1), twin.allowed(largest(output)), "the output is symmetric", twin)
