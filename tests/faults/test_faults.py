"""Seeded faults: each breaks the code in one place, and a named test must notice.

A test that nobody has seen fail proves nothing. Every fault is put into a copy of the package and the tests, the named
test runs there, and has to fail by an AssertionError: a broken import, a wrong shape or any other exception does not
count.

Run all with `pytest tests/faults -m slow`, or as a script for a table: `python tests/faults/test_faults.py [names]`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = "sparse_sr_attn/functional/cluster.py"
LAYOUT = "sparse_sr_attn/functional/cluster/layout.py"
NEIGHBORS = "sparse_sr_attn/functional/cluster/neighbors.py"
TILES = "sparse_sr_attn/functional/cluster/tiles.py"
KERNELS = "sparse_sr_attn/functional/cluster/triton_kernels.py"
TRITON = "sparse_sr_attn/functional/cluster/triton.py"
FLEX = "sparse_sr_attn/functional/cluster/flex.py"
FORMS = "sparse_sr_attn/functional/backend.py"
EXPORTING = "sparse_sr_attn/functional/_torch.py"
PRECISION = "sparse_sr_attn/functional/_torch.py"
KMEANS = "sparse_sr_attn/functional/kmeans.py"
RECOMPUTATION = "sparse_sr_attn/functional/_torch.py"
BASE = "sparse_sr_attn/layers/base.py"
LCOA = "sparse_sr_attn/layers/lcoa.py"
LEARNERS = "sparse_sr_attn/layers/running_state.py"
PROCESSES = "sparse_sr_attn/functional/_torch.py"
BASICSR_MODEL = "integrations/sparse_sr_attn_basicsr/model.py"
BASICSR_COMMANDS = "integrations/sparse_sr_attn_basicsr/commands.py"
LCOAN = "sparse_sr_attn/backbones/lcoan.py"
UNIT_KEYS = "sparse_sr_attn/functional/unit_keys.py"
SHIFT = "sparse_sr_attn/functional/shift.py"
GRID = "sparse_sr_attn/functional/window/grid.py"
WINDOWS = "sparse_sr_attn/functional/window/tiles.py"
BATCH_NORM = "sparse_sr_attn/functional/batch_norm.py"
GMSA = "sparse_sr_attn/layers/gmsa.py"
ELAB = "sparse_sr_attn/blocks/elab.py"
BODY = "sparse_sr_attn/blocks/body.py"
NETWORK = "sparse_sr_attn/backbones/base.py"
ELAN = "sparse_sr_attn/backbones/elan.py"
RCAN = "sparse_sr_attn/backbones/rcan.py"
RESIDUAL = "sparse_sr_attn/blocks/residual.py"
CHECKPOINTS = "sparse_sr_attn/checkpoints/load.py"
CONVERSION = "sparse_sr_attn/checkpoints/convert.py"
EXPORT = "sparse_sr_attn/inference/onnx.py"
FILES = "sparse_sr_attn/data/atomic.py"
IMAGES = "sparse_sr_attn/data/images.py"
INFERENCE = "sparse_sr_attn/inference/tiling.py"
VISUALIZE = "sparse_sr_attn/inference/visualize.py"
HUB = "sparse_sr_attn/checkpoints/hub.py"
SPANDREL = "integrations/sparse_sr_attn_spandrel/architectures.py"
ATTACHMENT = "sparse_sr_attn/backbones/attach.py"
DENSE = "sparse_sr_attn/functional/dense.py"
EVALUATION = "sparse_sr_attn/data/metrics.py"
PAPER = "sparse_sr_attn/paper"
SPARSEMAX = "sparse_sr_attn/functional/sparsemax.py"
KERNEL = "sparse_sr_attn/functional/random_features.py"
LSH = "sparse_sr_attn/functional/lsh.py"
NLA = "sparse_sr_attn/layers/nla.py"
HSPA = "sparse_sr_attn/layers/hspa.py"
ENLA = "sparse_sr_attn/layers/enla.py"
NLSA = "sparse_sr_attn/layers/nlsa.py"
CATEGORY = "sparse_sr_attn/layers/category.py"
TIMM = "sparse_sr_attn/layers/timm_layers.py"
BENCH_MEMORY = "sparse_sr_attn/testing/memory.py"
BENCH_ORACLES = "benchmarks/speed/oracles.py"
BENCH_PEERS = "benchmarks/speed/peers.py"
BENCH_REPORT = "benchmarks/speed/report.py"
BENCH_RUN = "benchmarks/speed/run.py"
BENCH_STANDINS = "benchmarks/speed/standins.py"
BENCH_TIMING = "benchmarks/speed/timing.py"

COMMANDS = "integrations/sparse_sr_attn_basicsr/commands.py"
LOADING = "integrations/sparse_sr_attn_basicsr/data.py"
MODEL = "integrations/sparse_sr_attn_basicsr/model.py"

IN_BROKEN = "tests/integrations/test_broken_files.py"
IN_RESUME = "tests/integrations/test_resume.py"
IN_CLUSTER = "tests/functional/test_cluster.py"
IN_NEIGHBORS = "tests/functional/test_cluster_neighbors.py"
IN_TRITON = "tests/functional/test_cluster_triton.py"
IN_FLEX = "tests/functional/test_cluster_flex.py"
IN_FORMS = "tests/functional/test_forms.py"
IN_EXPORTING = "tests/functional/test_exporting.py"
IN_GRAPHS = "tests/test_graphs.py"
IN_KMEANS = "tests/functional/test_kmeans.py"
IN_SIZES = "tests/functional/test_sizes.py"
IN_ROUNDS = "tests/functional/test_rounds.py"
IN_SHIFT = "tests/functional/test_shift.py"
IN_WINDOW = "tests/functional/test_window.py"
IN_BATCH_NORM = "tests/functional/test_batch_norm.py"
IN_CONTRACT = "tests/layers/test_conformance.py"
IN_GMSA = "tests/layers/test_gmsa.py"
IN_EDSR = "tests/backbones/test_edsr.py"
IN_ELAN = "tests/backbones/test_elan.py"
IN_ABLATIONS = "tests/layers/test_ablations.py"
IN_REUSE = "tests/layers/test_reuse.py"
IN_ONE_UPDATE = "tests/layers/test_one_update.py"
IN_DISTRIBUTED = "tests/layers/test_distributed.py"
IN_DATA_PARALLEL = "tests/reliability/test_data_parallel.py"
IN_LAUNCHER = "tests/integrations/test_distributed.py"
IN_LMDB = "tests/integrations/test_lmdb.py"
IN_LOSSES = "tests/integrations/test_losses.py"
IN_GAN = "tests/integrations/test_gan.py"
IN_BASICSR_MODEL = "tests/integrations/test_model.py"
IN_MEMORY = "tests/layers/test_memory.py"
IN_RCAN = "tests/backbones/test_rcan.py"
IN_LCOAN = "tests/backbones/test_lcoan.py"
IN_CHECKPOINTS = "tests/test_checkpoints.py"
IN_CONVERT = "tests/test_convert.py"
IN_EXPORT = "tests/test_export.py"
IN_INFERENCE = "tests/test_inference.py"
IN_MAPS = "tests/test_attention_maps.py"
IN_UPSCALE = "tests/test_cli_upscale.py"
IN_HUB = "tests/test_hub.py"
IN_SPANDREL = "tests/integrations/test_spandrel.py"
IN_ATTACHMENT = "tests/test_attachment.py"
IN_DENSE = "tests/functional/test_dense.py"
IN_SPARSEMAX = "tests/functional/test_sparsemax.py"
IN_KERNEL = "tests/functional/test_kernel.py"
IN_LSH = "tests/functional/test_lsh.py"
IN_PEERS = "tests/layers/test_peers.py"
IN_TIMM = "tests/layers/test_timm_layers.py"
IN_BENCH_CLI = "tests/test_cli_bench.py"
IN_EVALUATION = "tests/test_evaluation.py"
IN_PAPER = "tests/test_paper.py"
IN_BENCH_MEMORY = "tests/bench/test_memory.py"
IN_BENCH_ORACLES = "tests/bench/test_oracles.py"
IN_BENCH_PEERS = "tests/bench/test_peers.py"
IN_BENCH_RUN = "tests/bench/test_run.py"
IN_BENCH_STANDINS = "tests/bench/test_standins.py"
IN_BENCH_TIMING = "tests/bench/test_timing.py"


@dataclass(frozen=True)
class Fault:
    """One change that must not go unnoticed.

    Attributes:
        name: what goes wrong.
        file: where, relative to the repository.
        old: the text that is replaced; exactly once in the file.
        new: what replaces it.
        test: the test that must fail.
    """

    name: str
    file: str
    old: str
    new: str
    test: str


def contract(clause: str, layer: str = "LCoA") -> str:
    return f"{IN_CONTRACT}::test_contract[{layer}: {clause}]"


FAULTS = [
    # --- who sees whom
    Fault(
        "a chunk met twice counts twice",
        LAYOUT,
        "(place >= first) & (place < stop)",
        "(place >= first)",
        f"{IN_CLUSTER}::test_a_key_counts_as_often_as_it_should",
    ),
    Fault(
        "the last chunk of an even ring is not seen",
        LAYOUT,
        "return first, first + self.num_chunks",
        "return first, first + (self.num_chunks - 1) // 2 * 2 + 1",
        f"{IN_CLUSTER}::test_chunks_in_sight_of_all_are_plain_attention",
    ),
    Fault(
        "the first chunks of a table do not count",
        LAYOUT,
        "first = 0 if self.nearest else self",
        "first = self",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "padding is visible",
        LAYOUT,
        "return (slot < self.num_tokens) & (place",
        "return (slot >= 0) & (place",
        f"{IN_CLUSTER}::test_chunks_in_sight_of_all_are_plain_attention",
    ),
    Fault(
        "padding is visible around the ring (tiles)",
        LAYOUT,
        "[(chunk + offset) % self.num_chunks for",
        "[(chunk + offset) for",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "padding is visible (tiles)",
        LAYOUT,
        "                runs.append(slice(last - tail, last))\n",
        "                pass\n",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "every chunk hides as much as the last (tiles)",
        LAYOUT,
        "elif tail and chunk == self.num_chunks - 1:",
        "elif tail:",
        f"{IN_CLUSTER}::test_hidden_is_what_is_not_visible",
    ),
    Fault(
        "a chunk met twice counts twice (tiles)",
        LAYOUT,
        "if not first <= place < stop:",
        "if place < first:",
        f"{IN_CLUSTER}::test_a_key_counts_as_often_as_it_should",
    ),
    Fault(
        "hidden keys are those of the neighbour before (tiles)",
        LAYOUT,
        "last = (place + 1) * i",
        "last = max(place, 1) * i",
        f"{IN_CLUSTER}::test_hidden_is_what_is_not_visible",
    ),
    Fault(
        "the higher chunk wins a tie",
        NEIGHBORS,
        "steps.mul_(num_rows).sub_(",
        "steps.mul_(num_rows).add_(",
        f"{IN_NEIGHBORS}::test_neighbors_equal_loops",
    ),
    Fault(
        "what a chunk sends back goes to its chunks in another order (tiles)",
        TILES,
        "0, self._neighbors[tile.chunks].flatten(), parts",
        "0, self._neighbors.sort(dim=1).values[tile.chunks].flatten(), parts",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "who sees a chunk is who it sees",
        TRITON,
        "order, *_seen_by(pattern), largest",
        "order, *_sees(pattern), largest",
        f"{IN_TRITON}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "the published filling repeats the first tokens",
        LAYOUT,
        "modulo(slot - (self.num_slots - self.num_tokens), self.num_tokens)",
        "modulo(slot, self.num_tokens)",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "the published counting hides what is met twice",
        LAYOUT,
        "        if not self.exact_keys:\n            return torch.ones_like(slot, dtype=torch.bool)\n",
        "",
        f"{IN_CLUSTER}::test_a_key_counts_as_often_as_it_should",
    ),
    Fault(
        "a chunk is not cut to the sample",
        LAYOUT,
        "        if pattern.exact_keys:\n            chunk_size = smaller(chunk_size, num_tokens)\n",
        "",
        f"{IN_CLUSTER}::test_weights_equal_loops",
    ),
    Fault(
        "neighbours are swapped",
        CLUSTER,
        "chunks.roll(-offset, dims=1)",
        "chunks.roll(offset, dims=1)",
        f"{IN_CLUSTER}::test_weights_equal_loops",
    ),
    Fault(
        "a neighbour is missing",
        CLUSTER,
        "chunks.roll(-offset, dims=1)",
        "chunks.roll(-max(offset, 0), dims=1)",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "the ring of chunks is open",
        TILES,
        "device=order.device) % layout.num_slots",
        "device=order.device).clamp(0, layout.num_slots - 1)",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "tokens of a cluster stand in reverse",
        CLUSTER,
        "else place) * num_tokens + position)",
        "else place) * num_tokens - position)",
        f"{IN_CLUSTER}::test_order_sorts_by_cluster_then_position",
    ),
    Fault(
        "clusters are mixed up by the sorting key",
        CLUSTER,
        "else place) * num_tokens + position)",
        "else place) + position)",
        f"{IN_CLUSTER}::test_order_sorts_by_cluster_then_position",
    ),
    # --- the one-shot form
    Fault(
        "results stay in sorted order (oneshot)",
        CLUSTER,
        "gather(1, inverse[..., None]",
        "gather(1, slot[..., None]",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "results are sorted once more instead of back (oneshot)",
        CLUSTER,
        "gather(1, inverse[..., None]",
        "gather(1, self.order[..., None]",
        f"{IN_CLUSTER}::test_application_equals_loops",
    ),
    Fault(
        "the scale is dropped (oneshot)",
        CLUSTER,
        "scores = scale * self.chunks(query)",
        "scores = self.chunks(query)",
        f"{IN_CLUSTER}::test_scale_is_a_factor_on_the_query",
    ),
    Fault(
        "values of the neighbours are not gathered with the keys' order (oneshot)",
        CLUSTER,
        "self.to_tokens(weights @ self._with_adjacent(self.chunks(value)))",
        "self.to_tokens(weights @ self._with_adjacent(self.chunks(value).flip(1)).flip(1))",
        f"{IN_CLUSTER}::test_weights_then_application_is_the_fused_operation",
    ),
    # --- the tile form
    Fault(
        "results stay in sorted order (tiles)",
        TILES,
        "torch.index_select(slots, 0, self._slot, out=out)",
        "out.copy_(slots[: len(out)])",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "the scale is dropped (tiles)",
        TILES,
        "queries = queries if self.scale == 1 else self.scale * queries\n",
        "pass\n",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "the scale is dropped in the backward (tiles)",
        TILES,
        "        if scored.scale != 1:\n            grad_scores.mul_(scored.scale)\n",
        "",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "softmax forgets its normaliser in the backward (tiles)",
        TILES,
        "torch.ops.aten._softmax_backward_data.out(grad_weights, weights, -1, weights.dtype, grad_input=grad_weights)",
        "grad_weights.mul_(weights)",
        f"{IN_CLUSTER}::test_weights_equal_loops",
    ),
    Fault(
        "keys get no gradient (tiles)",
        TILES,
        "        tokens.send_back(grad_scores, tokens.chunks(scored.query, tile), self._halo, tile)\n",
        "",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "a tile forgets the gradients of keys that others sent",
        TILES,
        "tokens.send_back(grad_scores, tokens.chunks(scored.query, tile), self._halo, tile)",
        "tokens.send_back(grad_scores, tokens.chunks(scored.query, tile), self._halo.zero_(), tile)",
        f"{IN_CLUSTER}::test_weights_equal_loops",
    ),
    Fault(
        "a tile forgets the gradients of values that others sent (fused)",
        TILES,
        "tokens.send_back(weights, sent, halo, tile)",
        "tokens.send_back(weights, sent, halo.zero_(), tile)",
        f"{IN_CLUSTER}::test_weights_then_application_is_the_fused_operation",
    ),
    Fault(
        "a tile forgets the gradients of values that others sent (in two)",
        TILES,
        ".to(v.dtype), sent, halo, tile)",
        ".to(v.dtype), sent, halo.zero_(), tile)",
        f"{IN_CLUSTER}::test_application_equals_loops",
    ),
    Fault(
        "overlapping windows overwrite each other (tiles)",
        TILES,
        ".baddbmm_(part.transpose(1, 2), rows)",
        ".copy_(part.transpose(1, 2) @ rows)",
        f"{IN_CLUSTER}::test_weights_serve_a_second_value",
    ),
    Fault(
        "what is sent back is not transposed (tiles)",
        TILES,
        ".baddbmm_(part.transpose(1, 2), rows)",
        ".baddbmm_(part, rows)",
        f"{IN_CLUSTER}::test_application_equals_loops",
    ),
    Fault(
        "what is sent back goes to the opposite neighbour (tiles)",
        TILES,
        "first = (tile.start + offset) * i",
        "first = (tile.start + self.layout.num_offsets - 1 - offset) * i",
        f"{IN_CLUSTER}::test_application_equals_loops",
    ),
    Fault(
        "what goes back around the end of the ring is lost (tiles)",
        TILES,
        "            *range(layout.num_chunks, layout.num_chunks + self.reach),\n",
        "",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "what goes back around the start of the ring is lost (tiles)",
        TILES,
        "            *range(-self.reach, 0),\n",
        "",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "tokens that fill the last chunk get no gradient for it (tiles)",
        TILES,
        "        if not layout.exact_keys:  #",
        "        if layout.num_adjacent < 0:  #",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "slots past the last token send gradients (tiles)",
        TILES,
        "        chunks.flatten(0, 1)[self.layout.num_tokens - tile.start * self.layout.chunk_size :] = 0\n",
        "",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "all samples read the first (tiles)",
        TILES,
        "yield sample, _Sorted(each, layout) if",
        "yield sample, _Sorted(order[0], layout) if",
        f"{IN_CLUSTER}::test_a_batch_is_its_samples",
    ),
    Fault(
        "scores of half inputs are half",
        PRECISION,
        "return torch.float64 if tensor.dtype == torch.float64 else torch.float32",
        "return tensor.dtype",
        f"{IN_CLUSTER}::test_scores_and_softmax_of_half_inputs_are_float32",
    ),
    Fault(
        "the higher precision multiplies",
        PRECISION,
        "if first.dtype.itemsize < second.dtype.itemsize",
        "if first.dtype.itemsize > second.dtype.itemsize",
        f"{IN_CLUSTER}::test_weights_and_values_meet_in_the_lower_precision",
    ),
    Fault(
        "weights come in float32 whatever is asked",
        CLUSTER,
        "dtype = dtype or working_precision(query)",
        "dtype = working_precision(query)",
        f"{IN_CLUSTER}::test_weights_of_lower_precision_are_rounded",
    ),
    Fault(
        "tiles do not bring keys to unit length",
        TILES,
        "return (unit_keys(halo) if unit else halo)",
        "return halo",
        f"{IN_CLUSTER}::test_normalised_keys_are_unit_keys",
    ),
    Fault(
        "length counts in the gradient of unit keys",
        UNIT_KEYS,
        "(grad - along * units)",
        "grad",
        f"{IN_CLUSTER}::test_normalised_keys_are_unit_keys",
    ),
    Fault(
        "below the floor the length counts in the gradient",
        UNIT_KEYS,
        ".masked_fill_(length < _FLOOR, 0)",
        "",
        f"{IN_CLUSTER}::test_normalised_keys_are_unit_keys",
    ),
    Fault(
        "the gradient of short keys knows no floor",
        UNIT_KEYS,
        "sent: Tensor = (grad - along * units) / length.clamp(min=_FLOOR)",
        "sent: Tensor = (grad - along * units) / length.clamp(min=1e-12)",
        f"{IN_CLUSTER}::test_normalised_keys_are_unit_keys",
    ),
    Fault(
        "the key is written before its length is undone (tiles)",
        TILES,
        "grad_key.copy_(unit_keys_backward(grad_units, scored.key))",
        "grad_key.copy_(grad_units)",
        f"{IN_CLUSTER}::test_normalised_keys_are_unit_keys",
    ),
    # --- k-means
    Fault(
        "centroids are stale: the pending update is applied after the assignment",
        KMEANS,
        "        _apply_pending(state, ema_decay, reseed_threshold)\n"
        "        best, assignment = _nearest(points, centroids)\n",
        "        best, assignment = _nearest(points, centroids)\n"
        "        _apply_pending(state, ema_decay, reseed_threshold)\n",
        f"{IN_KMEANS}::test_pending_is_applied_before_the_assignment",
    ),
    Fault(
        "centroids move in a recomputation",
        KMEANS,
        "if backward_is_running():",
        "if points.ndim == 0:",
        f"{IN_KMEANS}::test_nothing_moves_while_a_backward_runs",
    ),
    Fault(
        "activation checkpointing moves centroids twice",
        KMEANS,
        "if backward_is_running():",
        "if points.ndim == 0:",
        contract("checkpointed is plain"),
    ),
    Fault(
        "the moving average is inverted",
        KMEANS,
        "moved = ema_decay * centroids + (1 - ema_decay) * _unit(sums)",
        "moved = (1 - ema_decay) * centroids + ema_decay * _unit(sums)",
        f"{IN_KMEANS}::test_movement_equals_loops",
    ),
    Fault(
        "large clusters pull harder",
        KMEANS,
        "(1 - ema_decay) * _unit(sums)",
        "(1 - ema_decay) * sums",
        f"{IN_KMEANS}::test_movement_equals_loops",
    ),
    Fault(
        "centroids are not renormalised",
        KMEANS,
        "return torch.where(keeps[:, None], centroids, _unit(moved))",
        "return torch.where(keeps[:, None], centroids, moved)",
        f"{IN_KMEANS}::test_movement_equals_loops",
    ),
    Fault(
        "empty clusters lose their centroid",
        KMEANS,
        "keeps = (counts == 0) | (sums.norm(dim=-1) <= _EPS) | (moved.norm(dim=-1) <= _EPS)",
        "keeps = counts < 0",
        f"{IN_KMEANS}::test_movement_equals_loops",
    ),
    Fault(
        "long tokens weigh more",
        KMEANS,
        "    units = _unit(points).flatten(0, 1)\n    index",
        "    units = points.to(working_precision(points)).flatten(0, 1)\n    index",
        f"{IN_KMEANS}::test_length_of_a_token_does_not_matter",
    ),
    Fault(
        "the dead are never reseeded",
        KMEANS,
        "dead = usage * num_clusters < reseed_threshold",
        "dead = usage * num_clusters < 0",
        f"{IN_KMEANS}::test_dead_clusters_come_back_to_life",
    ),
    Fault(
        "clusters are reseeded though that is off",
        KMEANS,
        "dead = usage * num_clusters < reseed_threshold",
        "dead = usage * num_clusters < max(reseed_threshold, 0.9)",
        f"{IN_KMEANS}::test_without_reseeding_the_dead_stay_dead",
    ),
    Fault(
        "the dead take seeds that are not there",
        KMEANS,
        "    dead &= turn < (seeds.norm(dim=-1) > 0.5).sum()\n",
        "",
        f"{IN_KMEANS}::test_degenerate_tokens_are_finite_and_deterministic[more clusters than tokens-torch.float32]",
    ),
    Fault(
        "the reseeded stay dead in the books",
        KMEANS,
        "    usage = torch.where(dead, torch.full_like(usage, 1 / num_clusters), usage)\n",
        "",
        f"{IN_KMEANS}::test_steps_equal_the_twin",
    ),
    Fault(
        "the most similar tokens become seeds",
        KMEANS,
        "similarity.flatten().sort(stable=True)",
        "similarity.flatten().sort(stable=True, descending=True)",
        f"{IN_KMEANS}::test_seeds_equal_sorting",
    ),
    Fault(
        "the decay does not warm up",
        KMEANS,
        "decay = torch.clamp((1 + updates) / (10 + updates), max=ema_decay)",
        "decay = torch.full_like(updates, ema_decay)",
        f"{IN_KMEANS}::test_steps_equal_the_twin",
    ),
    Fault(
        "updates are not counted",
        KMEANS,
        "    state.num_updates.add_(pending)\n",
        "",
        f"{IN_KMEANS}::test_steps_equal_the_twin",
    ),
    Fault(
        "sums of all steps pile up",
        KMEANS,
        "state.pending_sums.copy_(sums)",
        "state.pending_sums.add_(sums)",
        f"{IN_KMEANS}::test_steps_equal_the_twin",
    ),
    Fault(
        "NaN gets into the buffers",
        KMEANS,
        "finite = sums.isfinite().all()",
        "finite = sums.isfinite().all() | True",
        f"{IN_KMEANS}::test_a_token_that_is_not_finite_spoils_nothing[nan]",
    ),
    Fault(
        "skipped updates are not counted",
        KMEANS,
        "    state.num_skipped.add_(~finite)\n",
        "",
        f"{IN_KMEANS}::test_a_token_that_is_not_finite_spoils_nothing[inf]",
    ),
    Fault(
        "half tokens are clustered in half precision",
        PRECISION,
        "return torch.float64 if tensor.dtype == torch.float64 else torch.float32",
        "return tensor.dtype",
        f"{IN_KMEANS}::test_half_tokens_are_clustered_in_float32[torch.bfloat16]",
    ),
    Fault(
        "first centroids are drawn from the global generator",
        KMEANS,
        "directions = torch.randn(num_clusters, dim, generator=generator, ",
        "directions = torch.randn(num_clusters, dim, ",
        f"{IN_KMEANS}::test_first_centroids_are_unit_vectors_set_by_the_seed",
    ),
    # --- several forwards, several processes
    Fault(
        "of accumulated steps only the last counts",
        KMEANS,
        "sums, counts = state.pending_sums + sums, state.pending_counts + counts",
        "pass",
        f"{IN_KMEANS}::test_accumulated_steps_are_one_step_on_all_their_tokens",
    ),
    Fault(
        "accumulated steps forget earlier seeds",
        KMEANS,
        "_least_similar_of(torch.cat([state.pending_seeds, seeds]), state.centroids)",
        "_least_similar_of(seeds, state.centroids)",
        f"{IN_KMEANS}::test_accumulated_steps_are_one_step_on_all_their_tokens",
    ),
    Fault(
        "centroids move between accumulated steps",
        KMEANS,
        "        if not accumulate:\n            _apply_pending(",
        "        if True:\n            _apply_pending(",
        f"{IN_ONE_UPDATE}::test_parts_teach_what_the_whole_batch_does",
    ),
    Fault(
        "one update goes on for ever",
        LEARNERS,
        "            learner._accumulates = False\n",
        "            pass\n",
        f"{IN_ONE_UPDATE}::test_outside_each_forward_makes_its_own",
    ),
    Fault(
        "one update moves what does not learn",
        LEARNERS,
        "if isinstance(m, KMeansLearner) and m.learns() and not m._accumulates",
        "if isinstance(m, KMeansLearner) and not m._accumulates",
        f"{IN_ONE_UPDATE}::test_what_does_not_learn_does_not_move[None]",
    ),
    Fault(
        "the model does not pass on one update",
        BASICSR_MODEL,
        "with one_kmeans_update(net) if self._one_kmeans_update else nullcontext():",
        "with nullcontext():",
        f"{IN_BASICSR_MODEL}::test_under_accumulation_kmeans_moves_once_a_step_when_asked",
    ),
    Fault(
        "k-means counts the tokens of the first process only",
        KMEANS,
        "all_counts.sum(dim=0)[:, 0]",
        "all_counts[0, :, 0]",
        f"{IN_DISTRIBUTED}::test_two_processes_are_one[LSP-4 and 6 pictures]",
    ),
    Fault(
        "the variance of several batches leaves out how far they are apart",
        BATCH_NORM,
        "((counts - 1) * variances + counts * (means - joined).square())",
        "((counts - 1) * variances)",
        f"{IN_DISTRIBUTED}::test_two_processes_are_one[BatchNorm2d-4 and 6 pictures]",
    ),
    Fault(
        "a process that is gone is not spoken of",
        PROCESSES,
        "    except RuntimeError as error:\n",
        "    except LookupError as error:\n",
        f"{IN_DISTRIBUTED}::test_uneven_numbers_of_batches_end_in_an_error[k-means, the other leaves]",
    ),
    Fault(
        "DataParallel is warned of where it loses nothing, and only there",
        LEARNERS,
        "        if self.learns():\n            _warn_of_replicas()",
        "        if not self.learns():\n            _warn_of_replicas()",
        f"{IN_DATA_PARALLEL}::test_what_is_lost_in_training_is_warned_of_once[LSP]",
    ),
    Fault(
        "processes on the CPU do not share gradients",
        BASICSR_MODEL,
        'return DistributedDataParallel(net, find_unused_parameters=self.opt.get("find_unused_parameters", False))',
        "return net",
        f"{IN_LAUNCHER}::test_two_processes_train_as_one_does_on_the_batch_of_both[LCoAN]",
    ),
    Fault(
        "validation waits for the other processes",
        BASICSR_MODEL,
        'net = self.net_g_ema if hasattr(self, "net_g_ema") else self.get_bare_model(self.net_g)',
        'net = self.net_g_ema if hasattr(self, "net_g_ema") else self.net_g',
        f"{IN_LAUNCHER}::test_validation_and_testing_go_through_a_launcher_too",
    ),
    # --- the layers
    Fault(
        "keys are not normalised",
        LCOA,
        "return cluster_attention_rounds(embedding, embedding, values, pattern, num_rounds, normalize_keys=True)",
        "return cluster_attention_rounds(embedding, embedding, values, pattern, num_rounds)",
        f"{IN_SIZES}::test_every_layout_at_one_size[2-1]",
    ),
    Fault(
        "queries are normalised",
        LCOA,
        "        return embedding, pattern\n",
        "        return nn.functional.normalize(embedding, dim=-1), pattern\n",
        f"{IN_SIZES}::test_every_size[5-each key once]",
    ),
    Fault(
        "published counting is not passed on",
        LCOA,
        "            exact_keys=self.exact_keys,\n            place=",
        "            place=",
        f"{IN_SIZES}::test_every_size[5-as published]",
    ),
    Fault(
        "k-means moves in evaluation",
        LCOA,
        'return self.training and self.routing == "kmeans" and self.ema_decay < 1',
        'return self.routing == "kmeans" and self.ema_decay < 1',
        contract("evaluation moves nothing", "LSP"),
    ),
    Fault(
        "k-means does not move in training",
        LCOA,
        'return self.training and self.routing == "kmeans" and self.ema_decay < 1',
        "return False",
        f"{IN_CONTRACT}::test_centroids_move_in_training[LCoA]",
    ),
    Fault(
        "a decay of one does not freeze",
        LCOA,
        'return self.training and self.routing == "kmeans" and self.ema_decay < 1',
        'return self.training and self.routing == "kmeans"',
        f"{IN_CONTRACT}::test_a_decay_of_one_freezes_the_centroids[LSP]",
    ),
    Fault(
        "the shared weights are detached",
        LCOA,
        "apply_cluster_weights(state.weights, ",
        "apply_cluster_weights(state.weights.detach(), ",
        contract("every parameter learns", "LSP"),
    ),
    Fault(
        "res_scale is ignored",
        LCOA,
        "alpha=self.res_scale",
        "alpha=0.1",
        f"{IN_CONTRACT}::test_res_scale_is_read_when_it_is_used[0.0]",
    ),
    Fault(
        "the residual is missing",
        LCOA,
        "return torch.add(x, feature_map(attended, x), alpha=self.res_scale)",
        "return self.res_scale * feature_map(attended, x)",
        contract("zero init is the identity"),
    ),
    Fault(
        "zero_init is ignored",
        BASE,
        "    if zero_init:\n",
        "    if zero_init and embed_dim < 0:\n",
        contract("zero init is the identity", "CoA"),
    ),
    Fault(
        "a layer ignores the state it is given",
        LCOA,
        "        if state is None:\n            state = self.lsp(",
        "        if state is None or self.training is not None:\n            state = self.lsp(",
        contract("state of another size is refused", "LCoA sharing"),
    ),
    Fault(
        "a state with as many tokens passes for one of the same size",
        BASE,
        "if made_for != (x.shape[0], *x.shape[2:]):",
        "if made_for[1] * made_for[2] != x.shape[2] * x.shape[3] or made_for[0] != x.shape[0]:",
        contract("state of another size is refused", "CoA"),
    ),
    Fault(
        "height and width of a state are swapped",
        LCOA,
        "(height, width), num_rounds, reuse = x.shape",
        "(width, height), num_rounds, reuse = x.shape",
        f"{IN_SIZES}::test_every_size[5-each key once]",
    ),
    Fault(
        "the map is read by columns",
        BASE,
        '"b c h w -> b (h w) c"',
        '"b c h w -> b (w h) c"',
        f"{IN_SIZES}::test_every_size[5-each key once]",
    ),
    Fault(
        "a consumer made by a layer forgets zero_init",
        LCOA,
        "res_scale=self.coa.res_scale, zero_init=self.zero_init)",
        "res_scale=self.coa.res_scale)",
        f"{IN_CONTRACT}::test_make_consumer_passes_the_options_on",
    ),
    # --- each other property and clause, seen red once
    Fault(
        "order is not a permutation of a sample's tokens",
        CLUSTER,
        "num_tokens + position).argsort(dim=1)",
        "num_tokens + position).argsort(dim=0)",
        f"{IN_CLUSTER}::test_order_has_an_inverse",
    ),
    Fault(
        "the sorting key has room for four tokens",
        CLUSTER,
        "else place) * num_tokens + position)",
        "else place) * 4 + position)",
        f"{IN_CLUSTER}::test_names_of_clusters_do_not_matter",
    ),
    Fault(
        "chunks two steps away are seen",
        CLUSTER,
        "chunks.roll(-offset, dims=1)",
        "chunks.roll(-2 * offset, dims=1)",
        f"{IN_CLUSTER}::test_an_unseen_token_cannot_matter",
    ),
    Fault(
        "gradients go to chunks two steps away",
        CLUSTER,
        "chunks.roll(-offset, dims=1)",
        "chunks.roll(-2 * offset, dims=1)",
        f"{IN_CLUSTER}::test_an_unseen_token_receives_no_gradient",
    ),
    Fault(
        "softmax without subtracting the largest (tiles)",
        TILES,
        "return torch.softmax(scores, dim=-1, out=scores)",
        "return scores.exp_().div_(scores.sum(dim=-1, keepdim=True))",
        f"{IN_CLUSTER}::test_rows_of_weights_sum_to_one",
    ),
    Fault(
        "rows of empty slots overwrite a token (tiles)",
        TILES,
        "torch.index_select(slots, 0, self._slot, out=out)",
        "out.index_copy_(0, self._token[self.margin : self.margin + len(slots)], slots)",
        f"{IN_CLUSTER}::test_padding_is_neutral",
    ),
    Fault(
        "empty slots hold a token of another chunk",
        LAYOUT,
        "return slot.clamp(max=self.num_tokens - 1)",
        "return slot.masked_fill(slot >= self.num_tokens, 0)",
        f"{IN_CLUSTER}::test_an_unseen_token_cannot_matter",
    ),
    Fault(
        "the forms differ",
        TILES,
        "device=order.device) % layout.num_slots",
        "device=order.device).clamp(0, layout.num_slots - 1)",
        f"{IN_CLUSTER}::test_auto_is_one_of_the_forms",
    ),
    Fault(
        "rows are read without regard to strides (tiles)",
        TILES,
        "(rows.to(working_precision(rows)).contiguous() for rows in (query, key))",
        "(\n"
        "            rows.to(working_precision(rows)).as_strided(rows.shape, (rows.shape[1], 1))\n"
        "            for rows in (query, key)\n"
        "        )",
        f"{IN_CLUSTER}::test_strides_do_not_matter",
    ),
    Fault(
        "weights are rounded to bfloat16 (tiles)",
        TILES,
        "lse=of_lse).to(v.dtype), ",
        "lse=of_lse).to(torch.bfloat16).to(v.dtype), ",
        f"{IN_CLUSTER}::test_low_precision_errs_no_more_than_dense_attention[tiles-torch.float32]",
    ),
    Fault(
        "autocast reaches the scores (oneshot)",
        CLUSTER,
        "    with without_autocast(query):\n        oneshot = _Oneshot(pattern)\n"
        "        scores = oneshot.scores(query, key, scale)\n        weights",
        "    if True:\n        oneshot = _Oneshot(pattern)\n"
        "        scores = oneshot.scores(query, key, scale)\n        weights",
        f"{IN_CLUSTER}::test_autocast_does_not_reach_the_scores",
    ),
    Fault(
        "queries get no gradient (tiles)",
        TILES,
        "torch.bmm(grad_scores, scored.keys(tile), out=tokens.at(self._slots, tile))",
        "tokens.at(self._slots, tile).zero_()",
        f"{IN_CLUSTER}::test_gradcheck",
    ),
    Fault(
        "a chunk of nothing passes",
        CLUSTER,
        "if chunk_size < 1 or num_adjacent < 0:",
        "if chunk_size < 0:",
        f"{IN_CLUSTER}::test_impossible_chunks_are_refused",
    ),
    Fault(
        "an operator returns other strides than it promises",
        TILES,
        "return like.new_empty(like.shape) if out is None else out",
        "return torch.empty_like(like) if out is None else out",
        "tests/functional/test_operators.py::test_strides[1]",
    ),
    Fault(
        "an operator moves what it does not declare",
        KMEANS,
        '        "usage",\n',
        "",
        "tests/functional/test_operators.py::test_kmeans_step",
    ),
    Fault(
        "tokens go to the farthest centroid",
        KMEANS,
        "products = block @ centroids.T",
        "products = block @ -centroids.T",
        f"{IN_KMEANS}::test_assignment_equals_loops",
    ),
    Fault(
        "the highest index wins a tie",
        KMEANS,
        "        best, index = (points @ centroids.to(points.dtype).T).max(dim=-1)\n    return best, index\n",
        "        best, index = (points @ centroids.to(points.dtype).T).flip(-1).max(dim=-1)\n"
        "    return best, len(centroids) - 1 - index\n",
        f"{IN_KMEANS}::test_nearest_is_argmax",
    ),
    Fault(
        "counts are of the first sample",
        KMEANS,
        "    counts = index.new_zeros(num_clusters).index_add_(0, index, torch.ones_like(index))\n",
        "    index = assignment[0]\n"
        "    counts = index.new_zeros(num_clusters).index_add_(0, index, torch.ones_like(index))\n",
        f"{IN_KMEANS}::test_sums_equal_loops",
    ),
    Fault(
        "a centroid is lost when old and new cancel",
        KMEANS,
        " | (moved.norm(dim=-1) <= _EPS)",
        "",
        f"{IN_KMEANS}::test_a_cluster_whose_mean_is_opposite_keeps_its_centroid",
    ),
    Fault(
        "a checkpointed step moves twice",
        RECOMPUTATION,
        "return torch._C._current_graph_task_id() != -1",
        "return False",
        f"{IN_KMEANS}::test_a_checkpointed_step_moves_once",
    ),
    Fault(
        "autocast reaches k-means",
        KMEANS,
        '    with without_autocast(points):\n        if points.device.type == "cpu" and not needs_plain_code():\n',
        "    if True:\n        if needs_plain_code():\n",
        f"{IN_KMEANS}::test_autocast_does_not_reach_k_means",
    ),
    Fault(
        "the highest index wins a tie (by blocks)",
        KMEANS,
        "torch.amax(products.ge_(into[:, None]).mul_(rank), dim=-1, out=rank_into)",
        "torch.amax(products.ge_(into[:, None]).mul_(num_clusters + 1 - rank), dim=-1, out=rank_into)\n"
        "        rank_into.neg_().add_(num_clusters + 1)",
        f"{IN_KMEANS}::test_nearest_is_argmax",
    ),
    Fault(
        "all blocks of points read the first",
        KMEANS,
        "products = block @ centroids.T",
        "products = points.flatten(0, 1)[: len(block)] @ centroids.T",
        f"{IN_KMEANS}::test_nearest_is_argmax",
    ),
    Fault(
        "a point that is no number goes to a cluster that is not there",
        KMEANS,
        "(num_clusters - first).clamp_(max=num_clusters - 1).long()",
        "(num_clusters - first).long()",
        f"{IN_KMEANS}::test_a_point_that_is_no_number_goes_somewhere",
    ),
    Fault(
        "a map of one column divides by zero",
        LCOA,
        "return torch.add(x, feature_map(attended, x), alpha=self.res_scale)",
        "return x + self.res_scale * (x.new_tensor(x.shape[-1] - 1) / (x.shape[-1] - x.new_ones(())))"
        " * feature_map(attended, x)",
        contract("any size"),
    ),
    Fault(
        "an update counts twice",
        KMEANS,
        "state.num_updates.add_(pending)",
        "state.num_updates.add_(2 * pending)",
        contract("training moves state once a forward"),
    ),
    Fault(
        "a wrong number of channels is left to the convolution",
        BASE,
        "if x.ndim != 4 or x.shape[1] != embed_dim or 0 in x.shape[2:]:",
        "if x.ndim != 4 or 0 in x.shape[2:]:",
        contract("another number of channels is refused", "CoA"),
    ),
    Fault(
        "any object passes for a state",
        BASE,
        "    if not isinstance(state, wanted):\n",
        "    if state is None:\n",
        contract("a foreign state is refused", "LCoA sharing"),
    ),
    Fault(
        "a missing state is left to Python",
        BASE,
        "    if not isinstance(state, wanted):\n",
        "    if state is not None and not isinstance(state, wanted):\n",
        contract("a foreign state is refused", "CoA"),
    ),
    Fault(
        "a shared state has another temperature",
        LCOA,
        "pattern, num_rounds, normalize_keys=True, dtype=dtype)",
        "pattern, num_rounds, scale=0.9, normalize_keys=True, dtype=dtype)",
        contract("sharing with oneself changes nothing", "LCoA sharing"),
    ),
    Fault(
        "tokens are centred over the batch",
        LEARNERS,
        "return assign(points, state.centroids)",
        "return assign(points - points.mean(dim=(0, 1)), state.centroids)",
        contract("evaluation does not mix samples"),
    ),
    Fault(
        "NaN gets into a layer's buffers",
        KMEANS,
        "finite = sums.isfinite().all()",
        "finite = sums.isfinite().all() | True",
        contract("a sample that is not finite spoils no other"),
    ),
    Fault(
        "first centroids differ from run to run",
        KMEANS,
        "    generator = torch.Generator().manual_seed(seed)\n    directions",
        "    generator = torch.Generator()\n    generator.seed()\n    directions",
        contract("repeated runs are bit equal"),
    ),
    Fault(
        "maps are read without regard to strides",
        BASE,
        'return rearrange(x, "b c h w -> b (h w) c")',
        "return x.as_strided((len(x), x[0, 0].numel(), x.shape[1]), (x[0].numel(), 1, x[0, 0].numel()))",
        contract("strides do not matter"),
    ),
    Fault(
        "the residual is added in float32",
        LCOA,
        "return torch.add(x, ",
        "return torch.add(x.to(working_precision(x)), ",
        contract("precisions"),
    ),
    Fault(
        "loud scores overflow (tiles)",
        TILES,
        "return torch.softmax(scores, dim=-1, out=scores)",
        "return scores.exp_().div_(scores.sum(dim=-1, keepdim=True))",
        contract("loud half inputs stay finite"),
    ),
    Fault(
        "under autocast the branch is dropped",
        LCOA,
        "alpha=self.res_scale)",
        "alpha=self.res_scale * (attended.dtype == x.dtype))",
        contract("autocast"),
    ),
    Fault(
        "a state holds half weights",
        PRECISION,
        "return torch.float64 if tensor.dtype == torch.float64 else torch.float32",
        "return tensor.dtype",
        contract("scores of half inputs are float32", "LSP"),
    ),
    Fault(
        "the pending update is not saved",
        LCOA,
        "module.register_buffer(name, value)",
        'module.register_buffer(name, value, persistent=not name.startswith("pending"))',
        contract("copies go on alike"),
    ),
    Fault(
        "keys are detached",
        LCOA,
        "cluster_attention_rounds(embedding, embedding, values, ",
        "cluster_attention_rounds(embedding, embedding.detach(), values, ",
        contract("gradients are derivatives"),
    ),
    Fault(
        "a value has no bias",
        "sparse_sr_attn/functional/channels_last.py",
        "torch.baddbmm(bias, x",
        "torch.baddbmm(0 * bias, x",
        f"{IN_SIZES}::test_every_size[5-each key once]",
    ),
    Fault(
        "reuse is ignored",
        LCOA,
        'if reuse == "pattern" or (',
        "if (",
        f"{IN_REUSE}::test_what_a_state_holds",
    ),
    Fault(
        "a state on the CPU keeps the pattern unasked",
        LCOA,
        'reuse == "auto" and x.device.type != "cpu"',
        'reuse == "auto" and x.device.type == "cpu"',
        f"{IN_REUSE}::test_what_a_state_holds",
    ),
    Fault(
        "half_weights is ignored",
        LCOA,
        "dtype = torch.bfloat16 if self.half_weights else None",
        "dtype = None",
        f"{IN_REUSE}::test_half_weights_are_the_rounded_weights",
    ),
    Fault(
        "half weights of several rounds are whole",
        CLUSTER,
        "return weights if dtype is None else weights.to(dtype)",
        "return weights",
        f"{IN_REUSE}::test_half_weights_are_the_rounded_weights",
    ),
    Fault(
        "the embedding of a state is detached",
        LCOA,
        "num_rounds, embedding=embedding)",
        "num_rounds, embedding=embedding.detach())",
        f"{IN_REUSE}::test_the_pattern_is_as_good_as_the_weights",
    ),
    Fault(
        "keys are not normalised when weights are computed again",
        LCOA,
        "_attend(cast(Tensor, state.embedding), values, state.pattern, num_rounds)",
        "cluster_attention_rounds(*[cast(Tensor, state.embedding)] * 2, values, state.pattern, num_rounds)",
        f"{IN_REUSE}::test_the_pattern_is_as_good_as_the_weights",
    ),
    Fault(
        "rounds computed again read the rows of other samples",
        CLUSTER,
        "(tensor.repeat_interleave(num_rounds, dim=0) for tensor in (query, key, value))",
        "(tensor.repeat(num_rounds, 1, 1) for tensor in (query, key, value))",
        f"{IN_REUSE}::test_the_pattern_is_as_good_as_the_weights",
    ),
    Fault(
        "an LCoA alone stores its weights",
        LCOA,
        'self.lsp(x, reuse="pattern")',
        'self.lsp(x, reuse="weights")',
        f"{IN_MEMORY}::test_alone[128]",
    ),
    Fault(
        "all chunks are one tile",
        TILES,
        "_SCORES_PER_TILE = 2**18",
        "_SCORES_PER_TILE = 2**28",
        f"{IN_MEMORY}::test_alone[128]",
    ),
    Fault(
        "a later layer raises its half weights",
        TILES,
        "            v = value[sample].to(lower_precision(weights, value)).contiguous()\n",
        "            weights = weights.to(value.dtype)\n"
        "            v = value[sample].to(lower_precision(weights, value)).contiguous()\n",
        f"{IN_MEMORY}::test_half_weights_are_half[128]",
    ),
    Fault(
        "LCoAN keeps reuse to itself",
        LCOAN,
        "                    reuse=reuse,\n",
        "",
        f"{IN_REUSE}::test_a_network_passes_both_on",
    ),
    Fault(
        "LCoAN keeps half_weights to itself",
        LCOAN,
        "                    half_weights=half_weights,\n",
        "",
        f"{IN_REUSE}::test_a_network_passes_both_on",
    ),
    Fault(
        "LCoA keeps half_weights to itself",
        LCOA,
        "            half_weights=half_weights,\n",
        "",
        f"{IN_REUSE}::test_half_weights_are_the_rounded_weights",
    ),
    Fault(
        "a Python loop runs over the rows of a map",
        BASE,
        "    if x.ndim != 4 or x.shape[1] != embed_dim",
        "    for _ in range(x.shape[2]):\n        pass\n    if x.ndim != 4 or x.shape[1] != embed_dim",
        contract("sizes do not recompile"),
    ),
    Fault(
        "k-means stands still when compiled",
        LCOA,
        'return self.training and self.routing == "kmeans" and self.ema_decay < 1',
        "return self.training and self.ema_decay < 1 and not torch.compiler.is_compiling()",
        contract("compiled is eager"),
    ),
    Fault(
        "export fixes whether the last chunk is full",
        CLUSTER,
        "        return chunks.flatten(1, 2).gather(1, inverse[..., None].expand(-1, -1, chunks.shape[-1]))\n",
        "        rows = chunks.flatten(1, 2)[:, : self.layout.num_tokens]\n"
        "        return torch.empty_like(rows).scatter(1, self.order[..., None].expand_as(rows), rows)\n",
        contract("export with dynamic sizes"),
    ),
    Fault(
        "reentrant checkpointing moves centroids twice",
        RECOMPUTATION,
        "return torch._C._current_graph_task_id() != -1",
        "return torch.is_grad_enabled() and False",
        contract("reentrantly checkpointed is plain"),
    ),
    Fault(
        "a checkpointed compiled layer moves centroids twice",
        RECOMPUTATION,
        "return torch._C._current_graph_task_id() != -1",
        "return False",
        contract("compiled inside a checkpoint is plain"),
    ),
    Fault(
        "a compiled checkpointed layer moves centroids twice",
        RECOMPUTATION,
        "return torch._C._current_graph_task_id() != -1",
        "return False",
        contract("checkpointed and compiled is plain"),
    ),
    Fault(
        "two providers share one pattern",
        KMEANS,
        "    generator = torch.Generator().manual_seed(seed)\n    directions",
        "    generator = torch.Generator().manual_seed(0)\n    directions",
        f"{IN_KMEANS}::test_first_centroids_are_unit_vectors_set_by_the_seed",
    ),
    # --- tiles meet
    Fault(
        "the first chunk of a tile is in the tile before as well",
        TILES,
        "stop = min(start + step, layout.num_chunks)",
        "stop = min(start + step + 1, layout.num_chunks)",
        f"{IN_CLUSTER}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "a last chunk alone in its tile is left out",
        TILES,
        "for start in range(0, layout.num_chunks, step):",
        "for start in range(0, max(layout.num_chunks - 1, 1), step):",
        f"{IN_CLUSTER}::test_weights_equal_loops",
    ),
    # --- the ablations
    Fault(
        "rounds count alike",
        CLUSTER,
        "    share = cast(Tensor, lse).unflatten(0, (-1, num_rounds)).softmax(dim=1).flatten(0, 1)\n",
        "    share = torch.full_like(cast(Tensor, lse), 1 / num_rounds)\n",
        f"{IN_ROUNDS}::test_rounds_are_dense_attention_over_what_any_round_sees",
    ),
    Fault(
        "samples are taken for rounds",
        CLUSTER,
        "    share = cast(Tensor, lse).unflatten(0, (-1, num_rounds)).softmax(dim=1).flatten(0, 1)\n",
        "    share = cast(Tensor, lse).unflatten(0, (num_rounds, -1)).softmax(dim=0).flatten(0, 1)\n",
        f"{IN_ROUNDS}::test_rounds_are_dense_attention_over_what_any_round_sees",
    ),
    Fault(
        "rounds are averaged although their weights are shares",
        LCOA,
        "attended.unflatten(0, (-1, num_rounds)).sum(dim=1)",
        "attended.unflatten(0, (-1, num_rounds)).mean(dim=1)",
        f"{IN_ABLATIONS}::test_sharing_is_the_same_with_rounds",
    ),
    Fault(
        "rounds of a sample read the values of others",
        LCOA,
        "_each_round(values, num_rounds), state.pattern",
        "values.repeat(num_rounds, 1, 1), state.pattern",
        f"{IN_ABLATIONS}::test_sharing_is_the_same_with_rounds",
    ),
    Fault(
        "all rounds start from one seed",
        LCOA,
        "state = initial_state(num_clusters, query_dim, seed + turn)",
        "state = initial_state(num_clusters, query_dim, seed)",
        f"{IN_ABLATIONS}::test_every_round_learns_its_own_clusters",
    ),
    Fault(
        "a hash learns",
        LCOA,
        'return self.training and self.routing == "kmeans" and self.ema_decay < 1',
        "return self.training and self.ema_decay < 1",
        f"{IN_ABLATIONS}::test_a_hash_never_learns",
    ),
    Fault(
        "a hash is k-means that stands still",
        LCOA,
        'if routing == "lsh":',
        'if routing == "hash":',
        f"{IN_ABLATIONS}::test_each_option_changes_the_output",
    ),
    # --- other networks, other people's weights
    Fault(
        "RCAN's gate is open",
        RESIDUAL,
        "return x * gate",
        "return x",
        f"{IN_RCAN}::test_channel_attention_is_one_factor_a_channel",
    ),
    Fault(
        "RCAN's blocks ignore res_scale",
        RESIDUAL,
        "branch: Tensor = self.rcab(x)\n        return x + self.res_scale * branch",
        "branch: Tensor = self.rcab(x)\n        return x + branch",
        f"{IN_RCAN}::test_res_scale_enters_in_blocks_only",
    ),
    Fault(
        "RCAN's groups do not pass res_scale on",
        RCAN,
        "ChannelAttentionBlock(num_feat, squeeze_factor, res_scale)",
        "ChannelAttentionBlock(num_feat, squeeze_factor)",
        f"{IN_RCAN}::test_res_scale_enters_in_blocks_only",
    ),
    Fault(
        "the released LCoAN counts each key once",
        CHECKPOINTS,
        '"exact_keys": False',
        '"exact_keys": True',
        f"{IN_LCOAN}::test_equals_released_code[lcoan_small_x2_13x17_repeat]",
    ),
    Fault(
        "weights that are not finite are loaded",
        CHECKPOINTS,
        "if not value.isfinite().all()]",
        "if value.ndim < 0]",
        f"{IN_CHECKPOINTS}::test_bad_contents_give_one_clear_error[NaN]",
    ),
    Fault(
        "weights go before their average",
        CHECKPOINTS,
        '"params_ema", "params", ',
        '"params", "params_ema", ',
        f"{IN_CHECKPOINTS}::test_nesting_and_prefixes",
    ),
    Fault(
        "code in a file runs",
        CHECKPOINTS,
        "weights_only=True",
        "weights_only=False",
        f"{IN_CHECKPOINTS}::test_unreadable_files_give_one_clear_error[a payload]",
    ),
    # --- images, files and other programs
    Fault(
        "tiles are cut sharply where they should pass into each other",
        INFERENCE,
        "overlap, blend // 2)\n    columns",
        "overlap, 0)\n    columns",
        f"{IN_INFERENCE}::test_blending_leaves_no_seam",
    ),
    Fault(
        "tiles blend over pixels of the result instead of the input",
        INFERENCE,
        "max(end - start, 1e-9) / scale",
        "max(end - start, 1e-9)",
        f"{IN_INFERENCE}::test_blending_leaves_no_seam",
    ),
    Fault(
        "what neighbouring rows of tiles share is lost",
        INFERENCE,
        "band[..., : above.shape[-2], :] = above",
        "pass",
        f"{IN_INFERENCE}::test_shares_of_blended_tiles_add_up_to_one",
    ),
    Fault(
        "tiles meet at an edge",
        INFERENCE,
        "(start + length + following) // 2",
        "following",
        f"{IN_INFERENCE}::test_neighbouring_tiles_meet_in_the_middle_of_what_they_share",
    ),
    Fault(
        "sixteen bits become eight",
        IMAGES,
        "return Picture(pixels.astype(np.uint16), None, profile)",
        "return Picture((pixels >> 8).astype(np.uint8), None, profile)",
        f"{IN_UPSCALE}::test_sixteen_bits_stay",
    ),
    Fault(
        "the rotation of EXIF is forgotten",
        IMAGES,
        "ImageOps.exif_transpose(image)",
        "image",
        f"{IN_UPSCALE}::test_rotation_by_exif",
    ),
    Fault(
        "pixels are cut down instead of rounded",
        IMAGES,
        "(strip[0] * peak).round()",
        "(strip[0] * peak - 1).ceil()",
        f"{IN_UPSCALE}::test_grey_stays_grey",
    ),
    Fault(
        "grey is the red channel",
        IMAGES,
        "_LUMA = (0.299, 0.587, 0.114)",
        "_LUMA = (1.0, 0.0, 0.0)",
        f"{IN_UPSCALE}::test_grey_stays_grey",
    ),
    Fault(
        "a result is written in place",
        FILES,
        'temporary = file.with_name(f"{file.name}.tmp")',
        "temporary = file",
        f"{IN_UPSCALE}::test_killed_while_it_writes",
    ),
    Fault(
        "a file that came meanwhile is replaced",
        FILES,
        "        _check_free(file, overwrite)  # it may have come meanwhile\n",
        "",
        f"{IN_UPSCALE}::test_what_comes_meanwhile_stays_too",
    ),
    Fault(
        "released centroids lack an axis",
        CONVERSION,
        "value[None] if key",
        "value if key",
        f"{IN_CONVERT}::test_released_lcoan_goes_and_comes_back",
    ),
    Fault(
        "another pattern is left out without a word",
        CONVERSION,
        "if more := (again.keys() ^ before.keys()) - {OPTIONS}:",
        "if more := set[str]():",
        f"{IN_CONVERT}::test_what_has_no_place_is_refused",
    ),
    Fault(
        "the mean is subtracted twice",
        CHECKPOINTS,
        '"add_mean.bias": mean,',
        '"add_mean.bias": -mean,',
        f"{IN_CONVERT}::test_their_code_loads_it_strictly_and_gives_the_same_image",
    ),
    Fault(
        "the check takes any other cluster for a tie",
        EXPORT,
        "self.under_one_pattern <= TOLERANCE and self.margin <= _TIE",
        "self.under_one_pattern <= TOLERANCE",
        f"{IN_EXPORT}::test_the_check_notices_other_clusters",
    ),
    Fault(
        "the check compares the image with itself",
        EXPORT,
        "float((result - under_one_pattern).abs().max())",
        "float((as_is - as_is).abs().max())",
        f"{IN_EXPORT}::test_the_check_notices_another_image",
    ),
    Fault(
        "ties count as errors",
        EXPORT,
        "with torch.no_grad(), _watched(model, choices) as forced:",
        "with torch.no_grad(), _watched(model, watched.choices) as forced:",
        f"{IN_EXPORT}::test_ties_may_fall_either_way",
    ),
    Fault(
        "a pixel is shown to attend where its neighbour in the chunk does",
        VISUALIZE,
        "maps.scatter_add_(1, keys, weights[chunk, row])",
        "maps.scatter_add_(1, keys, weights[chunk, (row + 1) % layout.chunk_size])",
        f"{IN_MAPS}::test_is_the_row_of_dense_attention",
    ),
    Fault(
        "the overlap is the larger weight",
        VISUALIZE,
        "torch.minimum(one, other)",
        "torch.maximum(one, other)",
        f"{IN_MAPS}::test_overlap_is_the_common_share_of_dense_attention",
    ),
    # --- ELAN: the mistakes that move an image of the released code by more than 7 grey levels
    Fault(
        "query and value are swapped",
        CHECKPOINTS,
        "parts = (torch.cat(rows[::2]), torch.cat(rows[1::2]))",
        "parts = (torch.cat(rows[1::2]), torch.cat(rows[::2]))",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "query and value are interleaved channel by channel",
        CHECKPOINTS,
        "parts = (torch.cat(rows[::2]), torch.cat(rows[1::2]))",
        "parts = (value[::2], value[1::2])",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "all queries come before all values",
        CHECKPOINTS,
        "parts = (torch.cat(rows[::2]), torch.cat(rows[1::2]))",
        "parts = (value[: len(value) // 2], value[len(value) // 2 :])",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "scores are scaled by the root of the width",
        WINDOWS,
        "scores = torch.bmm(queries[tile], keys",
        "scores = torch.bmm(queries[tile] * queries.shape[-1] ** -0.5, keys",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "attention is transposed",
        WINDOWS,
        "torch.bmm(weights.to(value.dtype), values[tile]",
        "torch.bmm(weights.transpose(-1, -2).to(value.dtype), values[tile]",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "no block shifts",
        ELAN,
        "shift=index % 2 == 1",
        "shift=False",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "the first block shifts",
        ELAN,
        "shift=index % 2 == 1",
        "shift=index % 2 == 0",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "windows are handed out in reverse",
        GMSA,
        "self.window_sizes = tuple(window_sizes)[:embed_dim]",
        "self.window_sizes = tuple(window_sizes)[:embed_dim][::-1]",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "BatchNorm is skipped in evaluation",
        GMSA,
        "return pointwise_conv2d(x, *self.folded())",
        "return self.conv(x)",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "the output convolution is skipped",
        GMSA,
        "self.output(torch.cat(attended, dim=1))",
        "torch.cat(attended, dim=1)",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "left and right are swapped",
        SHIFT,
        "_TAPS = ((1, 2), (1, 0), (2, 1), (0, 1))",
        "_TAPS = ((1, 0), (1, 2), (2, 1), (0, 1))",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "up and down are swapped",
        SHIFT,
        "_TAPS = ((1, 2), (1, 0), (2, 1), (0, 1))",
        "_TAPS = ((1, 2), (1, 0), (0, 1), (2, 1))",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "opposite borders meet in shift convolutions",
        SHIFT,
        "        F.pad(x[:, index * share : (index + 1) * share], (1 - column, column - 1, 1 - row, row - 1))",
        "        x[:, index * share : (index + 1) * share].roll((1 - row, 1 - column), dims=(2, 3))",
        f"{IN_SHIFT}::test_shift_equals_loops",
    ),
    Fault(
        "the picture is padded by its border",
        ELAN,
        "torch.minimum(place, period - place)",
        "torch.minimum(torch.arange(len(place), device=x.device), torch.tensor(side - 1))",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "the mean is not added again",
        NETWORK,
        "return output + mean.to(output.device)",
        "return output",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "the mean is not subtracted",
        NETWORK,
        "(x - mean.to(x.device)) * self.img_range",
        "x * self.img_range",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "the long skip is missing",
        ELAN,
        "self.conv_last(self.features(first) + first)",
        "self.conv_last(self.features(first))",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "windows move back as far as they were moved, where released weights expect otherwise",
        CHECKPOINTS,
        '"exact_shift": False,',
        '"exact_shift": True,',
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "LFE has no activation",
        "sparse_sr_attn/layers/shift_conv.py",
        "F.relu(self._shift_conv(self.conv1, x))",
        "self._shift_conv(self.conv1, x)",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    Fault(
        "the variance that runs is the biased one",
        BATCH_NORM,
        " * (count / (count - 1))",
        "",
        f"{IN_ELAN}::test_equals_a_released_training_step",
    ),
    Fault(
        "the mean is rounded to float32",
        NETWORK,
        "        self.mean = self._mean_like(self.mean)\n",
        "",
        f"{IN_ELAN}::test_equals_released_code",
    ),
    # --- windows, shifts and normalisation
    Fault(
        "pads are visible",
        WINDOWS,
        "        if self.grid.is_whole:\n            return None\n",
        "        if True:\n            return None\n",
        f"{IN_WINDOW}::test_pads_have_no_weight",
    ),
    Fault(
        "pads are looked for where they were before the shift",
        WINDOWS,
        "grid.is_real(shift, query.device)",
        "grid.is_real(0, query.device)",
        f"{IN_WINDOW}::test_weights_equal_loops",
    ),
    Fault(
        "pads weigh a little",
        WINDOWS,
        "torch.finfo(scores.dtype).min",
        "-30.0",
        f"{IN_WINDOW}::test_rows_of_weights_sum_to_one",
    ),
    Fault(
        "slots of a window are transposed",
        GRID,
        "y % size * size + x % size",
        "x % size * size + y % size",
        f"{IN_WINDOW}::test_application_equals_loops",
    ),
    Fault(
        "windows are shifted the other way",
        GRID,
        "place // size + shift, self.rows",
        "place // size - shift, self.rows",
        f"{IN_WINDOW}::test_a_shifted_window_begins_further_on",
    ),
    Fault(
        "windows are shifted in one direction only",
        GRID,
        "place % size + shift, self.columns",
        "place % size, self.columns",
        f"{IN_WINDOW}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "the result goes back by another way than asked",
        "sparse_sr_attn/functional/window.py",
        "unshift = shift if unshift is None else unshift\n    if uses",
        "unshift = unshift or shift\n    if uses",
        f"{IN_WINDOW}::test_application_equals_loops",
    ),
    Fault(
        "scores are in the precision of the features",
        WINDOWS,
        "queries = windows.cut(query, shift, working_precision(query))",
        "queries = windows.cut(query, shift)",
        contract("scores of half inputs are float32", "GMSA sharing"),
    ),
    Fault(
        "the gradient of the scores forgets the softmax",
        WINDOWS,
        "torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)",
        "grad_weights * weights",
        f"{IN_WINDOW}::test_weights_equal_loops",
    ),
    Fault(
        "the gradient of values goes back to unshifted windows",
        WINDOWS,
        "return grad_weights, windows.join(grad_values, shift)",
        "return grad_weights, windows.join(grad_values, unshift)",
        f"{IN_WINDOW}::test_application_equals_loops",
    ),
    Fault(
        "queries that are the keys get the gradient of queries alone",
        WINDOWS,
        "torch.bmm(grad_scores + grad_scores.transpose(1, 2), queries)",
        "torch.bmm(grad_scores, queries)",
        f"{IN_WINDOW}::test_queries_may_be_the_keys",
    ),
    Fault(
        "what goes around is put beside its place",
        WINDOWS,
        "slice(padded - shift, padded - shift + front)",
        "slice(padded - front, padded)",
        f"{IN_WINDOW}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "an LFE in strips sees a line too few",
        "sparse_sr_attn/layers/shift_conv.py",
        "start - above : stop + 2",
        "start - above : stop + 1",
        f"{IN_GMSA}::test_lfe_in_strips_is_the_whole",
    ),
    Fault(
        "large windows of a state forget the shift",
        GMSA,
        "cast(Tensor, query), None, value, window_size=size, shift=shift,",
        "cast(Tensor, query), None, value, window_size=size, shift=0,",
        f"{IN_GMSA}::test_what_is_kept_of_large_windows_is_enough",
    ),
    Fault(
        "the program for export trusts that there are no pads",
        GRID,
        "        if is_exporting():\n            return False\n",
        "",
        contract("export with dynamic sizes", "GMSA"),
    ),
    Fault(
        "an exported program has no spare window",
        GRID,
        "self.rows * self.columns + int(is_exporting())",
        "self.rows * self.columns",
        contract("export with dynamic sizes", "GMSA"),
    ),
    Fault(
        "the masked form has the taps of another form",
        SHIFT,
        "(index + 1) * share, row, column] = 1",
        "(index + 1) * share, column, row] = 1",
        f"{IN_GMSA}::test_both_forms_of_a_shift_convolution_are_one_layer",
    ),
    Fault(
        "the first channels take what is left over",
        SHIFT,
        "share = x.shape[1] // _SHARES\n    if",
        "share = -(-x.shape[1] // _SHARES)\n    if",
        f"{IN_SHIFT}::test_each_fifth_reads_the_neighbour_it_should",
    ),
    Fault(
        "a shift in place goes the wrong way",
        SHIFT,
        "slice(max(-step, 0), min(-step, 0) or None)",
        "slice(max(step, 0), min(step, 0) or None)",
        f"{IN_SHIFT}::test_shift_equals_loops",
    ),
    Fault(
        "statistics move in a recomputation",
        BATCH_NORM,
        "    if backward_is_running():\n        return\n",
        "",
        contract("checkpointed is plain", "GMSA"),
    ),
    Fault(
        "statistics that are not finite are taken over",
        BATCH_NORM,
        "    finite = torch.stack([value.isfinite().all() for _, value in moved]).all()\n",
        "    finite = torch.ones((), dtype=torch.bool)\n",
        contract("a sample that is not finite spoils no other", "GMSA"),
    ),
    Fault(
        "one value is normalised to its bias",
        BATCH_NORM,
        "F.batch_norm(x, running_mean.clone(),",
        "F.batch_norm(x, x.detach().mean((0, 2, 3)),",
        f"{IN_GMSA}::test_one_pixel_is_normalised_by_what_was_learnt",
    ),
    Fault(
        "folding forgets the bias of the convolution",
        GMSA,
        "offset = cast(Tensor, self.conv.bias).to(precision) - norm.running_mean.to(precision)",
        "offset = -norm.running_mean.to(precision)",
        f"{IN_ELAN}::test_folding_is_exact_and_leaves_training_alone",
    ),
    Fault(
        "training is folded too",
        GMSA,
        "        if not self.training and is_unmodified",
        "        if is_unmodified",
        f"{IN_ELAN}::test_equals_a_released_training_step",
    ),
    Fault(
        "later groups are the larger ones",
        GMSA,
        "least + (index < larger)",
        "least + (index >= num_groups - larger)",
        f"{IN_GMSA}::test_groups_are_even_and_the_first_are_larger",
    ),
    Fault(
        "odd windows are moved by the larger half",
        GMSA,
        "window_size // 2 if exact else -(-window_size // 2)",
        "-(-window_size // 2)",
        f"{IN_GMSA}::test_is_dense_attention_under_its_windows",
    ),
    Fault(
        "every attention of an ELAB attends anew",
        ELAB,
        "            if shared is None and len(self.attention) > 1:\n"
        "                shared = cast(GMSA, attention).attend(x)\n",
        "            shared = cast(GMSA, self.attention[0]).attend(x)\n",
        f"{IN_GMSA}::test_elab_by_hand",
    ),
    Fault(
        "an ELAB adds its LFE unscaled",
        ELAB,
        "x = torch.add(x, lfe(x), alpha=self.res_scale)",
        "x = x + lfe(x)",
        f"{IN_GMSA}::test_elab_by_hand",
    ),
    Fault(
        "every second site shifts, not every second provider",
        BODY,
        "find_layer(attention.type), turn // attention.share",
        "find_layer(attention.type), turn",
        f"{IN_EDSR}::test_gmsa_is_shared_by_gmsa",
    ),
    Fault(
        "reflection repeats the border",
        ELAN,
        "torch.minimum(place, period - place)",
        "torch.minimum(place, period - 1 - place)",
        f"{IN_ELAN}::test_reflection_goes_to_and_fro",
    ),
    Fault(
        "a network with blocks of its own carries no options",
        NETWORK,
        '("attention", "block") if name in options',
        '("attention",) if name in options',
        f"{IN_CHECKPOINTS}::test_networks_without_attention_carry_nothing",
    ),
    Fault(
        "masked kernels are taken from their middle",
        CHECKPOINTS,
        "(value * taps(value)).sum(dim=(2, 3), keepdim=True)",
        "value[:, :, 1:2, 1:2]",
        f"{IN_CHECKPOINTS}::test_masked_shift_convolutions_of_released_elan_load_too",
    ),
    Fault(
        "numbers that many weights share are counted often",
        CHECKPOINTS,
        "if sum(value.nbytes for value in content.values()) > sum(storages.values()):",
        "if sum(value.nbytes for value in content.values()) < 0:",
        f"{IN_CHECKPOINTS}::test_bad_contents_give_one_clear_error[weights that repeat one number]",
    ),
    Fault(
        "what options ask for together is not counted",
        CHECKPOINTS,
        "self.left -= math.prod(shape) + 4096",
        "self.left -= 0",
        f"{IN_CHECKPOINTS}::test_options_that_ask_for_too_much_together_are_refused_while_it_is_built"
        "[rounds of clusters]",
    ),
    # --- other programs
    Fault(
        "spandrel is told that weights of others are ours",
        SPANDREL,
        'carried_options(carried).get("type") == self.network',
        '"type" in carried_options(carried)',
        f"{IN_SPANDREL}::test_networks_of_others_stay_theirs",
    ),
    Fault(
        "spandrel takes the channels that leave for those that enter",
        SPANDREL,
        'input_channels=options["num_in_ch"]',
        'input_channels=options["num_out_ch"]',
        f"{IN_SPANDREL}::test_channels_are_those_of_the_network",
    ),
    Fault(
        "float16 is promised for images in 0..255",
        SPANDREL,
        "supports_half=model.img_range <= 1",
        "supports_half=True",
        f"{IN_SPANDREL}::test_half_precision",
    ),
    Fault(
        "a registry of one's own is passed over",
        SPANDREL,
        "    registry.add(",
        "    MAIN_REGISTRY.add(",
        f"{IN_SPANDREL}::test_a_registry_of_your_own_leaves_the_main_one_alone",
    ),
    Fault(
        "a plain network carries options, which BasicSR refuses",
        "sparse_sr_attn/backbones/base.py",
        "if options is not None and not _is_plain(options):",
        "if options is not None:",
        f"{IN_SPANDREL}::test_plain_networks_stay_unknown",
    ),
    Fault(
        "config.json is decoration",
        HUB,
        "            weights = {**(found.chosen.state if found else weights), OPTIONS: packed(config)}",
        "            pass",
        f"{IN_HUB}::test_a_network_without_attention_comes_back_with_all_its_options",
    ),
    Fault(
        "overrides are lost on the way from the hub",
        HUB,
        "load_model(weights, **(overrides or {}))",
        "load_model(weights)",
        f"{IN_HUB}::test_overrides_go_before_the_config_and_that_before_the_weights",
    ),
    Fault(
        "a folder is written in place, half of it when the disk is full",
        HUB,
        "hosted.save_pretrained(beside,",
        "hosted.save_pretrained(folder,",
        f"{IN_HUB}::test_what_cannot_be_saved_changes_nothing",
    ),
    Fault(
        "somebody's README is overwritten",
        HUB,
        "if file.name != _CARD or not (folder / _CARD).exists():",
        "if file.exists():",
        f"{IN_HUB}::test_saving_again_replaces_all_but_the_readme",
    ),
    # --- attention in other people's models
    Fault(
        "attention is counted among the children",
        ATTACHMENT,
        'for name, module in self._modules.items() if name != "attention"]',
        "for name, module in self._modules.items()]",
        f"{IN_ATTACHMENT}::test_it_is_still_a_sequential_of_its_children",
    ),
    Fault(
        "a slice carries attention along",
        ATTACHMENT,
        "        found = self._children()[index]\n",
        "        found = list(self._modules.items())[index]\n",
        f"{IN_ATTACHMENT}::test_it_is_still_a_sequential_of_its_children",
    ),
    Fault(
        "detaching leaves the layers behind",
        ATTACHMENT,
        "        del module.attention\n",
        "",
        f"{IN_ATTACHMENT}::test_detaching_leaves_the_model_as_it_was",
    ),
    Fault(
        "attached layers do not follow the trunk's precision",
        ATTACHMENT,
        "layers.to(weight.device, weight.dtype)",
        "layers.to(weight.device)",
        f"{IN_ATTACHMENT}::test_layers_come_where_the_trunk_is",
    ),
    Fault(
        "attached layers train in a model that does not",
        ATTACHMENT,
        "return layers.train(beside.training)",
        "return layers",
        f"{IN_ATTACHMENT}::test_the_output_stays_to_the_bit_and_old_names_stay[False-False]",
    ),
    Fault(
        "a trunk whose children the model runs itself is taken",
        ATTACHMENT,
        "    if not calls:\n",
        "    if not calls and not shapes:\n",
        f"{IN_ATTACHMENT}::test_what_cannot_be_is_explained_and_changes_nothing",
    ),
    Fault(
        "the call that looks for the width leaves the model in evaluation",
        ATTACHMENT,
        "            module.training = mode\n",
        "            module.training = False\n",
        f"{IN_ATTACHMENT}::test_a_width_that_parameters_do_not_tell_is_seen_in_a_call",
    ),
    Fault(
        "the call that looks for the width leaves hooks behind",
        ATTACHMENT,
        "            hook.remove()\n",
        "            pass\n",
        f"{IN_ATTACHMENT}::test_a_width_that_parameters_do_not_tell_is_seen_in_a_call",
    ),
    Fault(
        "every convolution gets the attention of the last",
        ATTACHMENT,
        "nn.ModuleList(layers.at(index))",
        "nn.ModuleList(layers.at(len(convolutions) - 1))",
        f"{IN_ATTACHMENT}::test_convolutions_of_a_token_trunk_get_attention_of_their_own",
    ),
    Fault(
        "a state is shared where it cannot travel",
        ATTACHMENT,
        "        if attention.share > 1:\n",
        "        if attention.share < 1:\n",
        f"{IN_ATTACHMENT}::test_what_cannot_be_is_explained_and_changes_nothing",
    ),
    Fault(
        "layers share by default what they do not have",
        "sparse_sr_attn/blocks/body.py",
        '"share": 4 if shares and provides else 1',
        '"share": 4 if shares else 1',
        f"{IN_ATTACHMENT}::test_a_layer_with_nothing_to_share_needs_no_share",
    ),
    Fault(
        "children can be changed under attention",
        ATTACHMENT,
        "append = insert = extend = pop = __delitem__",
        "insert = extend = pop = __delitem__",
        f"{IN_ATTACHMENT}::test_its_children_are_counted_for_good",
    ),
    # --- the peers
    Fault(
        "NLA: the scale is dropped",
        DENSE,
        "scale=scale)",
        "scale=1.0)",
        f"{IN_DENSE}::test_it_equals_loops",
    ),
    Fault(
        "NLA: scores of half inputs are half",
        DENSE,
        "dtype = working_precision(query)",
        "dtype = query.dtype",
        f"{IN_DENSE}::test_scores_of_half_inputs_are_float32",
    ),
    Fault(
        "NLA: strided rows need the memory of all scores",
        DENSE,
        "rows.contiguous()[:, None]",
        "rows[:, None]",
        f"{IN_DENSE}::test_memory_does_not_grow_with_the_square",
    ),
    Fault(
        "NLA: keys keep their length",
        NLA,
        "dense_attention(query, unit_keys(query), ",
        "dense_attention(query, query, ",
        f"{IN_PEERS}::test_it_is_its_formula",
    ),
    Fault(
        "HSPA: weights do not sum to 1",
        SPARSEMAX,
        "return (total - 1) / size, size",
        "return (total - 0.5) / size, size",
        f"{IN_SPARSEMAX}::test_attention_equals_its_twin",
    ),
    Fault(
        "HSPA: only the largest scores are looked at, as published",
        SPARSEMAX,
        "    while num_largest < num_scores and",
        "    while False and num_largest < num_scores and",
        f"{IN_SPARSEMAX}::test_attention_equals_its_twin",
    ),
    Fault(
        "HSPA: the threshold sends no gradient (oneshot)",
        SPARSEMAX,
        "total = torch.where(support, scores, 0)",
        "total = torch.where(support, scores.detach(), 0)",
        f"{IN_SPARSEMAX}::test_it_equals_alternating_projections",
    ),
    Fault(
        "HSPA: the threshold sends no gradient (tiles)",
        SPARSEMAX,
        "((grad_weights - mean) * support)",
        "(grad_weights * support)",
        f"{IN_SPARSEMAX}::test_gradients_of_attention_are_derivatives",
    ),
    Fault(
        "HSPA: the scale of the gradient is rounded to float32",
        SPARSEMAX,
        "grad_scores = scale * ((grad_weights - mean) * support)",
        "grad_scores = scale * support * (grad_weights - mean)",
        f"{IN_SPARSEMAX}::test_attention_equals_its_twin",
    ),
    Fault(
        "HSPA: the last tile overwrites gradients of keys",
        SPARSEMAX,
        "grad_key[sample] += grad",
        "grad_key[sample] = grad",
        f"{IN_SPARSEMAX}::test_attention_equals_its_twin",
    ),
    Fault(
        "HSPA: scores of half inputs are half",
        SPARSEMAX,
        "    dtype = working_precision(query)\n    with without_autocast(query):\n"
        "        q, k = query.to(dtype), key.to(dtype)\n        out = ",
        "    dtype = query.dtype\n    with without_autocast(query):\n"
        "        q, k = query.to(dtype), key.to(dtype)\n        out = ",
        f"{IN_SPARSEMAX}::test_scores_of_half_inputs_are_float32",
    ),
    Fault(
        "HSPA: the layer ignores its scale",
        HSPA,
        ", scale=self.scale)",
        ", scale=1.0)",
        f"{IN_PEERS}::test_it_is_its_formula",
    ),
    Fault(
        "ENLA: the length of keys is forgotten",
        KERNEL,
        " - key.square().sum(dim=-1)[:, None] / 2",
        "",
        f"{IN_KERNEL}::test_it_equals_its_twin",
    ),
    Fault(
        "ENLA: features that no key excites count as much",
        KERNEL,
        " + of_keys.logsumexp(dim=-1)[:, None]",
        "",
        f"{IN_KERNEL}::test_it_equals_its_twin",
    ),
    Fault(
        "ENLA: keys share out features instead of features keys",
        KERNEL,
        "of_keys.softmax(dim=-1)",
        "of_keys.softmax(dim=1)",
        f"{IN_KERNEL}::test_it_equals_its_twin",
    ),
    Fault(
        "ENLA: all seeds draw the same features",
        KERNEL,
        "manual_seed(seed)\n    shape",
        "manual_seed(0)\n    shape",
        f"{IN_KERNEL}::test_directions_depend_on_the_seed_alone",
    ),
    Fault(
        "ENLA: features are not orthogonal",
        KERNEL,
        "(lengths * rotations.transpose(-1, -2))",
        "(lengths * numbers / numbers.norm(dim=-1, keepdim=True))",
        f"{IN_KERNEL}::test_directions_are_normal_and_orthogonal_in_groups",
    ),
    Fault(
        "ENLA: all features have the same length",
        KERNEL,
        "lengths = others.norm(dim=-1, keepdim=True)",
        "lengths = dim**0.5",
        f"{IN_KERNEL}::test_directions_are_normal_and_orthogonal_in_groups",
    ),
    Fault(
        "ENLA: features are not in the state dict",
        ENLA,
        "random_directions(num_features, query_dim, seed))",
        "random_directions(num_features, query_dim, seed), persistent=False)",
        f"{IN_PEERS}::test_enla_keeps_its_features_in_the_state_dict",
    ),
    Fault(
        "ENLA: the amplification is squared",
        ENLA,
        "length = math.sqrt(self.amplification)",
        "length = self.amplification",
        f"{IN_PEERS}::test_it_is_its_formula",
    ),
    Fault(
        "ENLA: the contrastive loss takes the wrong ranks",
        KERNEL,
        "ranked[..., first:]",
        "ranked[..., count:]",
        f"{IN_KERNEL}::test_contrastive_loss_equals_sorting",
    ),
    Fault(
        "ENLA: the contrastive loss takes all queries",
        KERNEL,
        'device="cpu")[:num_queries]',
        'device="cpu")',
        f"{IN_KERNEL}::test_contrastive_loss_of_some_queries",
    ),
    Fault(
        "NLSA: a recomputation draws anew",
        LSH,
        "if not backward_is_running():",
        "if points.ndim:",
        f"{IN_LSH}::test_a_checkpointed_step_draws_once",
    ),
    Fault(
        "NLSA: activation checkpointing hashes anew",
        LSH,
        "if not backward_is_running():",
        "if points.ndim:",
        contract("checkpointed is plain", "NLSA"),
    ),
    Fault(
        "NLSA: a compiled recomputation hashes anew",
        LSH,
        "if not backward_is_running():",
        "if points.ndim:",
        contract("compiled inside a checkpoint is plain", "NLSA"),
    ),
    Fault(
        "NLSA: every step draws the same",
        LSH,
        "generator.manual_seed(turn + int(",
        "generator.manual_seed(int(",
        f"{IN_LSH}::test_draws_depend_on_seed_and_number_alone",
    ),
    Fault(
        "NLSA: draws come from the global generator",
        LSH,
        "return torch.randn(shape, generator=generator, ",
        "return torch.randn(shape, ",
        f"{IN_LSH}::test_draws_depend_on_seed_and_number_alone",
    ),
    Fault(
        "NLSA: evaluation draws, as published",
        NLSA,
        "if self.training and self.redraw:",
        "if self.redraw:",
        contract("evaluation moves nothing", "NLSA"),
    ),
    Fault(
        "NLSA: rounds count alike",
        CLUSTER,
        "    share = cast(Tensor, lse).unflatten(0, (-1, num_rounds)).softmax(dim=1)\n    with",
        "    share = cast(Tensor, lse).unflatten(0, (-1, num_rounds)).mul(0).softmax(dim=1)\n    with",
        f"{IN_ROUNDS}::test_rounds_are_dense_attention_over_what_any_round_sees",
    ),
    Fault(
        "NLSA: the normaliser sends a gradient without scale (tiles)",
        TILES,
        "scored.weights(tile).mul_(tokens.real_chunks(grad[sample, :, None], tile))",
        "scored.weights(tile).mul_(tokens.real_chunks(grad[sample, :, None], tile)).div_(scale)",
        f"{IN_ROUNDS}::test_lse_equals_loops",
    ),
    Fault(
        "NLSA: opposite directions share a bucket",
        LSH,
        "return torch.where(along.gather(-1, index) < 0, index + half, index)[..., 0]",
        "return index[..., 0]",
        f"{IN_LSH}::test_buckets_equal_loops",
    ),
    Fault(
        "NLSA: small maps have as many buckets as large ones",
        LSH,
        "used = torch.arange(along.shape[-1], device=along.device) < half",
        "used = torch.arange(along.shape[-1], device=along.device) >= 0",
        f"{IN_LSH}::test_buckets_equal_loops",
    ),
    Fault(
        "NLSA: maps smaller than a chunk have no bucket, as published",
        LSH,
        "larger(2, ",
        "larger(0, ",
        f"{IN_LSH}::test_number_of_buckets",
    ),
    Fault(
        "NLSA: all rounds have the same hash",
        LSH,
        "_draw((num_rounds, max_buckets // 2, dim), seed, 0)",
        "_draw((1, max_buckets // 2, dim), seed, 0).repeat(num_rounds, 1, 1)",
        f"{IN_PEERS}::test_nlsa_rounds_hash_differently",
    ),
    Fault(
        "category attention: categories are not attended to",
        CATEGORY,
        "feature_map(within + among, x)",
        "feature_map(within + 0 * among, x)",
        f"{IN_PEERS}::test_it_is_its_formula",
    ),
    Fault(
        "category attention: keys keep their length",
        CATEGORY,
        "unit_keys(tokens(self.key(x)))",
        "tokens(self.key(x))",
        f"{IN_PEERS}::test_it_is_its_formula",
    ),
    Fault(
        "category attention: evaluation moves centroids",
        CATEGORY,
        'return self.categories == "kmeans" and self.training and',
        'return self.categories == "kmeans" and',
        contract("evaluation moves nothing", "CategoryAttention"),
    ),
    Fault(
        "category attention: a decay of one does not freeze",
        CATEGORY,
        "self.training and self.ema_decay < 1",
        "self.training",
        f"{IN_PEERS}::test_categories_of_kmeans_move_in_training_only",
    ),
    Fault(
        "category attention: a learnt dictionary never learns",
        CATEGORY,
        "self.centroids = nn.Parameter(first.centroids)",
        'self.register_buffer("centroids", first.centroids)',
        f"{IN_PEERS}::test_learnt_categories_are_a_parameter",
    ),
    Fault(
        "timm: its layer is added to what it has changed",
        TIMM,
        "self.gain * (changed - x)",
        "self.gain * changed",
        f"{IN_TIMM}::test_it_is_timm_s_own_layer",
    ),
    Fault(
        "timm: the scale is ignored",
        TIMM,
        "x + self.res_scale * self.gain",
        "x + self.gain",
        f"{IN_TIMM}::test_it_is_timm_s_own_layer",
    ),
    Fault(
        "timm: zero_init is ignored",
        TIMM,
        "0.0 if starts_at_zero else 1.0",
        "1.0",
        f"{IN_TIMM}::test_it_can_start_as_the_identity_and_leave_it",
    ),
    Fault(
        "timm: two zeros never learn",
        TIMM,
        "starts_at_zero = zero_init and not _is_identity(attention, embed_dim)",
        "starts_at_zero = zero_init",
        f"{IN_TIMM}::test_it_can_start_as_the_identity_and_leave_it",
    ),
    Fault(
        "timm: a stride can be asked for",
        TIMM,
        '"dim_out", "stride", ',
        '"dim_out", ',
        f"{IN_TIMM}::test_a_wrong_option_is_explained",
    ),
    Fault(
        "timm: what does not fit is just unknown",
        TIMM,
        "if short in REFUSED:",
        "if not short:",
        f"{IN_TIMM}::test_a_wrong_option_is_explained",
    ),
    # --- benchmarks
    Fault(
        "freed memory counts on",
        BENCH_MEMORY,
        "now -= held.pop(address, 0)",
        "held.pop(address, 0)",
        f"{IN_BENCH_MEMORY}::test_a_case_counted_by_hand",
    ),
    Fault(
        "freeing what was there before lowers the peak",
        BENCH_MEMORY,
        "now -= held.pop(address, 0)",
        "now -= held.pop(address, -size)",
        f"{IN_BENCH_MEMORY}::test_what_an_earlier_measurement_has_seen_is_not_counted_either",
    ),
    Fault(
        "the result is dropped before memory is read",
        BENCH_MEMORY,
        "        result = call()\n",
        "        result = None\n        call()\n",
        f"{IN_BENCH_MEMORY}::test_a_case_counted_by_hand",
    ),
    Fault(
        "a speed-up pairs times of different rounds",
        BENCH_TIMING,
        "zip(slow, fast, strict=True)])",
        "zip(sorted(slow, key=lambda s: s.busy), fast, strict=True)])",
        f"{IN_BENCH_TIMING}::test_ratios_are_of_the_same_round",
    ),
    Fault(
        "rounds do not begin with another method each",
        BENCH_TIMING,
        "start = turn % max(1, len(names))",
        "start = 0",
        f"{IN_BENCH_TIMING}::test_calls_alternate_and_each_comes_first_in_turn",
    ),
    Fault(
        "growth is in sides, not in tokens",
        BENCH_RUN,
        "times = {r.side**2: r.busy.median for r in found.rows",
        "times = {r.side**2: r.busy.median**2 for r in found.rows",
        f"{IN_BENCH_RUN}::test_growth_is_between_the_first_and_the_last_size",
    ),
    Fault(
        "what is wrong gets a speed-up",
        BENCH_RUN,
        'if check.status == "wrong":\n        return f"{name} is wrong',
        'if check.status == "never":\n        return f"{name} is wrong',
        f"{IN_BENCH_RUN}::test_no_speed_up_for_an_output_that_is_wrong",
    ),
    Fault(
        "a rival that is wrong gives a speed-up",
        BENCH_RUN,
        "refusal(found, name, methods) or refusal(found, rival, methods)",
        "refusal(found, name, methods)",
        f"{IN_BENCH_RUN}::test_no_speed_up_for_an_output_that_is_wrong",
    ),
    Fault(
        "a slow stand-in is valid",
        BENCH_RUN,
        "return self.ratio <= self.allowed",
        "return self.ratio > 0",
        f"{IN_BENCH_RUN}::test_a_stand_in_must_be_as_fast_as_its_original",
    ),
    Fault(
        "outputs at the timed size are not looked at",
        BENCH_RUN,
        "bad = _plausible(call(), wanted)",
        "bad = None",
        f"{IN_BENCH_RUN}::test_an_output_that_is_wrong_at_the_size_that_is_timed",
    ),
    Fault(
        "outputs at the timed size are not compared",
        BENCH_RUN,
        "if not error <= allowed and found",
        "if error < 0 and found",
        f"{IN_BENCH_RUN}::test_a_wrong_number_at_the_size_that_is_timed",
    ),
    Fault(
        "code from outside may return another shape",
        BENCH_RUN,
        'return _plausible(output, wanted) or Check("not checked"',
        'return Check("not checked"',
        f"{IN_BENCH_CLI}::test_a_peer_of_another_shape_is_wrong",
    ),
    Fault(
        "gradients are not compared",
        BENCH_ORACLES,
        "    if backward:\n        probe",
        "    if False:\n        probe",
        f"{IN_BENCH_ORACLES}::test_a_wrong_gradient_is_wrong",
    ),
    Fault(
        "an error counts as a fraction of the map, not of what attention adds",
        BENCH_ORACLES,
        "if residual.shape == expected.shape:",
        "if residual.shape != expected.shape:",
        f"{IN_BENCH_ORACLES}::test_a_small_error_is_wrong",
    ),
    Fault(
        "not a number is a small error",
        BENCH_ORACLES,
        "if errors[worst] <= allowed:",
        "if not errors[worst] > allowed:",
        f"{IN_BENCH_ORACLES}::test_not_finite_is_wrong",
    ),
    Fault(
        "any assignment will do",
        BENCH_ORACLES,
        "if gap > allowed:",
        "if gap > 2:",
        f"{IN_BENCH_ORACLES}::test_tokens_in_a_cluster_that_is_not_the_nearest_are_wrong",
    ),
    Fault(
        "a stand-in pads with zeros",
        BENCH_STANDINS,
        "rows = torch.cat([rows, rows[..., -padding:, :]], dim=-2)",
        "rows = torch.cat([rows, 0 * rows[..., -padding:, :]], dim=-2)",
        f"{IN_BENCH_STANDINS}::test_lcoa_counts_keys_as_published",
    ),
    Fault(
        "a stand-in's hash rounds mix",
        BENCH_STANDINS,
        "merged: Tensor = (each * share.softmax(dim=1)).sum(dim=1)",
        "merged: Tensor = each.mean(dim=1)",
        f"{IN_BENCH_STANDINS}::test_nlsa_with_given_rotations",
    ),
    Fault(
        "a stand-in does not roll back",
        BENCH_STANDINS,
        "shifts=(size // 2, size // 2), dims=(2, 3)) if shift else x",
        "shifts=(0, 0), dims=(2, 3)) if shift else x",
        f"{IN_BENCH_STANDINS}::test_gmsa",
    ),
    Fault(
        "a stand-in's one-hot kernels look the other way",
        BENCH_STANDINS,
        "((1, 2), (1, 0), (2, 1), (0, 1))",
        "((1, 0), (1, 2), (2, 1), (0, 1))",
        f"{IN_BENCH_STANDINS}::test_shift_convolutions",
    ),
    Fault(
        "arguments of code from outside go before the width that is given",
        BENCH_PEERS,
        "if name in parameters and not arguments.keys() & set(names):",
        "if name in parameters:",
        f"{IN_BENCH_PEERS}::test_arguments",
    ),
    Fault(
        "the table shows no refusal",
        BENCH_REPORT,
        'cell = "refused" if speedup.ratio is None',
        'cell = "–" if speedup.ratio is None',
        f"{IN_BENCH_RUN}::test_no_speed_up_for_an_output_that_is_wrong",
    ),
    # --- other forms
    Fault(
        "the running sum is not rescaled",
        KERNELS,
        "total = total * rescale + tl.sum(powers, 1)",
        "total = total + tl.sum(powers, 1)",
        f"{IN_TRITON}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "what is gathered is not rescaled",
        KERNELS,
        "gathered = gathered * rescale[:, None]",
        "gathered = gathered * 1.0",
        f"{IN_TRITON}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "the kernel does not follow the largest score",
        KERNELS,
        "larger = tl.maximum(largest, tl.max(scores, 1))",
        "larger = tl.where(largest == float('-inf'), tl.max(scores, 1), largest)",
        f"{IN_TRITON}::test_large_scores_do_not_overflow",
    ),
    Fault(
        "kernels see the tail",
        KERNELS,
        "return _tokens(order, slot, mask, num_tokens, fill, EXACT), mask",
        "return _tokens(order, slot, mask, num_tokens, fill, EXACT), j < num_seen",
        f"{IN_TRITON}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "the kernel sees the chunks before the neighbours",
        TRITON,
        "sees=(-behind * i",
        "sees=(-(behind + 1) * i",
        f"{IN_TRITON}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "keys take gradients from the chunks behind them only",
        TRITON,
        "seen_by=(-ahead * i",
        "seen_by=(0 * i",
        f"{IN_TRITON}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "a repeated key takes its gradient once",
        KERNELS,
        "for turn in range(0, 1 + num_repeats):",
        "for turn in range(0, 1):",
        f"{IN_TRITON}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "a key repeated twice takes its gradient in the first place twice",
        KERNELS,
        "(repeat + (turn - 1) * num_tokens < num_slots)",
        "(repeat < num_slots)",
        f"{IN_TRITON}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "the slots past the last token repeat the first tokens",
        TRITON,
        "fill=-padding % n",
        "fill=0",
        f"{IN_TRITON}::test_attention_equals_masked_dense_attention",
    ),
    Fault(
        "the gradient of the lse gets lost",
        KERNELS,
        "        less -= tl.load(grad_lse",
        "        less -= 0 * tl.load(grad_lse",
        f"{IN_TRITON}::test_lse_equals_dense",
    ),
    Fault(
        "the gradient of the lse counts with every part of the values",
        KERNELS,
        "    if START == 0:",
        "    if START >= 0:",
        f"{IN_TRITON}::test_wide_values_go_in_parts",
    ),
    Fault(
        "only the first part of wide values sends gradients to queries",
        TRITON,
        "                grad_query += parts[0]\n",
        "",
        f"{IN_TRITON}::test_wide_values_go_in_parts",
    ),
    Fault(
        "the centroid of the last block wins a tie",
        KERNELS,
        "winner = tl.where(larger > largest,",
        "winner = tl.where(larger >= largest,",
        f"{IN_TRITON}::test_the_lowest_index_wins_a_tie",
    ),
    Fault(
        "the highest index of a block wins a tie",
        KERNELS,
        "tl.min(tl.where(scores == larger[:, None], cluster[None, :], num_clusters), 1)",
        "tl.max(tl.where(scores == larger[:, None], cluster[None, :], -1), 1)",
        f"{IN_TRITON}::test_the_lowest_index_wins_a_tie",
    ),
    Fault(
        "centroids that do not exist win",
        KERNELS,
        'scores = tl.where(is_cluster[None, :], scores, float("-inf"))',
        "scores = tl.where(is_cluster[None, :], scores, 0.0)",
        f"{IN_TRITON}::test_nearest_centroid",
    ),
    Fault(
        "half points are compared in half precision",
        KERNELS,
        "c = _rows(centroids, cluster, is_cluster, WIDTH, 0, BLOCK_D).to(WORK)",
        "c = _rows(centroids, cluster, is_cluster, WIDTH, 0, BLOCK_D).to(points.dtype.element_ty).to(WORK)",
        f"{IN_TRITON}::test_half_points_are_assigned_in_float32",
    ),
    Fault(
        "flex takes blocks that only some see for whole",
        FLEX,
        "(stop <= ((first + ahead + 1) * i)[:, None])",
        "(stop <= ((last + ahead + 1) * i)[:, None])",
        f"{IN_FLEX}::test_block_masks_show_what_the_pattern_shows",
    ),
    Fault(
        "flex takes the tail for whole",
        FLEX,
        "hidden = torch.nn.functional.pad(seen >= num_real",
        "hidden = torch.nn.functional.pad(seen >= layout.num_slots",
        f"{IN_FLEX}::test_block_masks_show_what_the_pattern_shows",
    ),
    Fault(
        "flex lists too few blocks",
        FLEX,
        "(block - 2) // i + 2 + ahead",
        "(block - 2) // i + 1 + ahead",
        f"{IN_FLEX}::test_block_masks_show_what_the_pattern_shows",
    ),
    Fault(
        "flex counts a chunk met twice twice",
        FLEX,
        "(a - min(a, (k - 1) // 2), a + min(a, k // 2))",
        "(a - min(a, k // 2), a + min(a, k // 2))",
        f"{IN_FLEX}::test_block_masks_show_what_the_pattern_shows",
    ),
    Fault(
        "a compiler counts as export",
        EXPORTING,
        "return torch.compiler._is_exporting_flag",
        "return torch.compiler.is_compiling() or torch.compiler._is_exporting_flag",
        f"{IN_EXPORTING}::test_only_export_is_exporting",
    ),
    Fault(
        "an exported program holds for the smaller size of its example only",
        EXPORTING,
        "return torch.sym_min(one, other) if is_exporting() else min(one, other)",
        "return min(one, other)",
        f"{IN_EXPORTING}::test_sizes_stay_symbolic",
    ),
    Fault(
        "networks without attention keep it",
        f"{PAPER}/variants.py",
        "            module.attention = NoAttention(module.conv.in_channels)\n",
        "            pass\n",
        f"{IN_PAPER}::test_without_attention_is_attention_that_adds_nothing",
    ),
    Fault(
        "kernels are exported",
        FORMS,
        '    if needs_plain_code():\n        return "oneshot"\n',
        "",
        f"{IN_FORMS}::test_auto_exports_oneshot",
    ),
    Fault(
        "auto takes triton where it is not installed",
        FORMS,
        'device.type == "cuda" and HAS_TRITON and',
        'device.type == "cuda" and',
        f"{IN_FORMS}::test_auto_does_without_triton",
    ),
    Fault(
        "the pattern asks the GPU for the number of clusters",
        CLUSTER,
        "    position = torch.arange(num_tokens, device=assignment.device)\n",
        "    position = torch.arange(num_tokens, device=assignment.device)\n    int(assignment.max())\n",
        f"{IN_GRAPHS}::test_layers_ask_for_no_value",
    ),
    Fault(
        "the tiles of training pairs do not overlap by a crop",
        "sparse_sr_attn/data/pairs.py",
        "range(0, last, tile - crop)",
        "range(0, last, tile)",
        "tests/test_pairs.py::test_every_crop_lies_in_a_tile",
    ),
    Fault(
        "the low resolution is cut at the place of the high one",
        "sparse_sr_attn/data/pairs.py",
        "top // upscale, left // upscale, tile // upscale",
        "top, left, tile // upscale",
        "tests/test_pairs.py::test_every_crop_lies_in_a_tile",
    ),
    Fault(
        "pairs that failed half-way leave what they wrote",
        "sparse_sr_attn/data/pairs.py",
        "    finally:\n        shutil.rmtree(partial, ignore_errors=True)",
        "    finally:\n        pass",
        "tests/test_pairs.py::test_files_replace_what_was_there_only_when_all_are_written",
    ),
    # --- broken files and full disks
    Fault(
        "a broken image has no name",
        LOADING,
        'return f"{name}: {reason}"',
        "return str(reason)",
        f"{IN_BROKEN}::test_a_broken_image_ends_testing_with_its_name",
    ),
    Fault(
        "an entry of a database is taken for a file",
        LOADING,
        "        if client in databases:\n",
        "        if client in databases and not databases:\n",
        f"{IN_LMDB}::test_an_error_that_is_not_of_the_file_is_told_as_it_is",
    ),
    Fault(
        "the discriminator is not looked at before a step",
        MODEL,
        "largest = {id(optimizer): _largest_gradient(optimizer) for optimizer in due}",
        "largest = {id(optimizer): _largest_gradient(optimizer) for optimizer in due[:1]}",
        f"{IN_GAN}::test_a_gradient_that_is_not_finite_changes_nothing",
    ),
    Fault(
        "an optimizer that spoils the weights is taken up",
        MODEL,
        "if not (_finite(weights) and all(",
        "if not (weights and all(",
        f"{IN_RESUME}::test_a_state_with_a_hostile_value_is_refused_before_anything_is_trained",
    ),
    Fault(
        "weights that are not finite are taken up",
        CHECKPOINTS,
        'return _lines({"of wrong type": types, "not finite": infinite})',
        'return _lines({"of wrong type": types})',
        "tests/integrations/test_pretrained.py::test_what_are_no_weights_is_told_in_a_few_lines_and_not_taken_up",
    ),
    Fault(
        "bytes pass for an image",
        NETWORK,
        "if not isinstance(x, Tensor) or not x.is_floating_point():",
        "if not isinstance(x, Tensor):",
        f"{IN_EDSR}::test_an_image_that_is_no_tensor_of_floating_point_is_refused",
    ),
    Fault(
        "patches are drawn from torch's own numbers",
        f"{PAPER}/pictures.py",
        "generator = torch.Generator().manual_seed(seed)",
        "generator = torch.Generator().manual_seed(int(torch.randint(10**9, ())))",
        f"{IN_PAPER}::test_all_variants_get_the_same_patches",
    ),
    Fault(
        "the patch of the high resolution is elsewhere",
        f"{PAPER}/pictures.py",
        "top, left, length = top * upscale, left * upscale, side * upscale",
        "length = side * upscale",
        f"{IN_PAPER}::test_patches_show_the_same_place_in_both_sizes",
    ),
    Fault(
        "a crop is the corner",
        f"{PAPER}/pictures.py",
        "(picture.shape[axis] - length) // 2, length)",
        "0, length)",
        f"{IN_PAPER}::test_a_crop_is_the_middle",
    ),
    Fault(
        "variants start from different networks",
        f"{PAPER}/training.py",
        "            torch.manual_seed(seed)\n",
        "            torch.seed()\n",
        f"{IN_PAPER}::test_all_variants_start_from_the_same_network",
    ),
    Fault(
        "results of another budget are taken for these",
        f"{PAPER}/training.py",
        'return {"budget": asdict(self.budget), **self._digests}',
        "return dict(self._digests)",
        f"{IN_PAPER}::test_a_result_is_kept_and_another_budget_is_another_result",
    ),
    Fault(
        "results on other pictures are taken for these",
        f"{PAPER}/training.py",
        'return {"budget": asdict(self.budget), **self._digests}',
        'return {"budget": asdict(self.budget)}',
        f"{IN_PAPER}::test_a_result_is_kept_and_another_budget_is_another_result",
    ),
    Fault(
        "validation leaves no border out",
        f"{PAPER}/training.py",
        "evaluation.luma(pair.high), border=upscale",
        "evaluation.luma(pair.high), border=0",
        f"{IN_PAPER}::test_validation_is_psnr_on_luma_without_a_border_of_the_factor",
    ),
    Fault(
        "standard attention is not scaled",
        f"{PAPER}/variants.py",
        "scale = query.shape[1] ** -0.5",
        "scale = 1.0",
        f"{IN_PAPER}::test_standard_attention_is_scaled_dot_product_attention",
    ),
    Fault(
        "seeds are not paired",
        f"{PAPER}/report.py",
        'results[name][seed]["psnr"] - results[baseline][seed]["psnr"]',
        'results[name][seed]["psnr"] - results[baseline][min(results[name])]["psnr"]',
        f"{IN_PAPER}::test_differences_are_of_the_same_seed",
    ),
    Fault(
        "two standard errors are enough for three seeds",
        f"{PAPER}/report.py",
        "quantile = _STUDENT[min(len(numbers) - 2, len(_STUDENT) - 1)]",
        "quantile = 2.0",
        f"{IN_PAPER}::test_student_t_as_scipy_has_it",
    ),
    Fault(
        "growth is counted over sides",
        f"{PAPER}/cost.py",
        "math.log((last / first) ** 2)",
        "math.log(last / first)",
        f"{IN_PAPER}::test_growth_is_the_exponent_over_pixels",
    ),
    Fault(
        "luma as MATLAB has it is not rounded",
        EVALUATION,
        'return _rounded(y) if protocol == "matlab" else y',
        "return y",
        f"{IN_EVALUATION}::test_luma_of_known_colours",
    ),
    Fault(
        "grey counts as luma for everybody",
        EVALUATION,
        'if protocol == "matlab":\n            return values',
        "return values",
        f"{IN_EVALUATION}::test_grey_is_three_equal_channels_or_luma_already",
    ),
    Fault(
        "a border is left out on two sides only",
        EVALUATION,
        "return one[border : one.shape[0] - border, border : one.shape[1] - border]",
        "return one[border:, border:]",
        f"{IN_EVALUATION}::test_agrees_with_basicsr",
    ),
    Fault(
        "structural similarity takes another constant",
        EVALUATION,
        "(0.03 * 255) ** 2",
        "(0.01 * 255) ** 2",
        f"{IN_EVALUATION}::test_agrees_with_basicsr",
    ),
    Fault(
        "the row bicubic rounds the small picture",
        EVALUATION,
        "small = imresize(y, size=(y.shape[0] // upscale, y.shape[1] // upscale))",
        "small = _rounded(imresize(y, size=(y.shape[0] // upscale, y.shape[1] // upscale)))",
        f"{IN_EVALUATION}::test_the_row_bicubic_rounds_luma_first_and_the_result_last",
    ),
]


# --- the runner -------------------------------------------------------------------------------------------------------


ASSERTIONS = (AssertionError, pytest.fail.Exception)  # the second is what pytest.raises raises if nothing was raised


class Recorder:
    """A pytest plugin that notes how each test ended."""

    def __init__(self) -> None:
        self.outcomes: list[dict[str, object]] = []

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        result = yield
        report = result.get_result()  # type: ignore[attr-defined]  pluggy's result of the hooks inside
        error = None if call.excinfo is None else call.excinfo.value
        if report.when == "call" or report.failed:
            self.outcomes.append(
                {
                    "test": item.nodeid,
                    "when": report.when,
                    "passed": report.passed,
                    "assertion": error is not None and all(isinstance(leaf, ASSERTIONS) for leaf in leaves(error)),
                    "error": "" if error is None else f"{type(error).__name__}: {error}"[:300],
                }
            )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcomes.append(
                {
                    "test": report.nodeid,
                    "when": "collect",
                    "passed": False,
                    "assertion": False,
                    "error": str(report.longrepr)[-300:],
                }
            )


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions in a group, or the exception itself."""
    inner = getattr(error, "exceptions", None)
    if isinstance(inner, tuple):
        for one in inner:
            yield from leaves(one)
    else:
        yield error


def problem_with(fault: Fault, root: Path = ROOT) -> str:
    """Return why a fault cannot be applied, or nothing."""
    count = (root / fault.file).read_text(encoding="utf-8").count(fault.old)
    if count != 1:
        return f"the old text of {fault.name!r} must stand in {fault.file} exactly once, it stands there {count} times"
    return ""


def copied(root: Path) -> Path:
    """Copy the package and what its tests need into `root`."""
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
    tests = ("backbones", "bench", "faults", "functional", "golden", "integrations", "layers", "reliability")
    for folder in ("sparse_sr_attn", "integrations", *(f"tests/{name}" for name in tests)):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    files = ("pyproject.toml", "docs/hosts.md", "tests/conftest.py")
    for file in (*(ROOT / name for name in files), *ROOT.glob("tests/test_*.py")):
        target = root / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return root


def run(root: Path, tests: list[str]) -> list[dict[str, object]]:
    """Run tests of a copy against that copy, in a process of their own, and return how each ended."""
    report = root / "report.json"
    command = [sys.executable, "tests/faults/test_faults.py", "--child", str(report), *tests]
    path = os.pathsep.join([str(root), str(root / "integrations")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "CI": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if not report.exists():
        raise RuntimeError(f"the copy did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    outcomes: list[dict[str, object]] = json.loads(report.read_text(encoding="utf-8"))
    return outcomes


def child(report: Path, tests: list[str]) -> int:
    """Run in the copy: run the tests, then prove that it was the copy that they tested."""
    recorder = Recorder()
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--tb=no", *tests], plugins=[recorder])
    import sparse_sr_attn  # not before pytest, which wants to be first where its plugins are concerned

    here = Path.cwd().resolve()
    if here not in Path(sparse_sr_attn.__file__).resolve().parents:
        raise RuntimeError(f"the package under {here} must be tested, but {sparse_sr_attn.__file__} was imported")
    report.write_text(json.dumps(recorder.outcomes), encoding="utf-8")
    return int(code)


def verdict(fault: Fault) -> str:
    """Return why a fault went unnoticed, or nothing if its test turned red as it should."""
    with tempfile.TemporaryDirectory() as folder:
        root = copied(Path(folder).resolve())
        problem = problem_with(fault, root)
        if problem:
            return problem
        file = root / fault.file
        file.write_text(file.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
        outcomes = run(root, [fault.test])
    if not outcomes:
        return f"{fault.test} does not exist"
    red = [outcome for outcome in outcomes if not outcome["passed"]]
    if not red:
        return f"{fault.test} stays green"
    if not any(outcome["assertion"] and outcome["when"] == "call" for outcome in red):
        return f"{fault.test} fails, but not by an assertion: {red[0]['error']}"
    return ""


# --- as tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_old_text_is_there_once(fault: Fault) -> None:
    """Fails when the code has changed under a fault, which must then be written anew."""
    assert not problem_with(fault)


def test_there_are_enough_and_no_two_alike() -> None:
    assert len(FAULTS) >= 25
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.file, fault.old, fault.new, fault.test) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_without_a_fault_all_named_tests_are_green(tmp_path: Path) -> None:
    tests = sorted({fault.test for fault in FAULTS})
    outcomes = run(copied(tmp_path.resolve()), tests)
    assert [outcome for outcome in outcomes if not outcome["passed"]] == []
    ran = {str(outcome["test"]) for outcome in outcomes}
    assert {test for test in tests if not any(one == test or one.startswith(f"{test}[") for one in ran)} == set()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_noticed(fault: Fault) -> None:
    assert not verdict(fault)


# --- as a script ------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="Put faults into a copy of the code and see whether the tests notice.")
    parser.add_argument("--child", metavar="REPORT", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help="only faults whose name contains one of these")
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.names)
    chosen = [f for f in FAULTS if not arguments.names or any(part in f.name for part in arguments.names)]
    missed = 0
    for fault in chosen:
        start = time.monotonic()
        answer = verdict(fault)
        missed += bool(answer)
        print(f"{'MISSED ' if answer else 'noticed'}  {time.monotonic() - start:5.1f} s  {fault.name}", flush=True)
        if answer:
            print(f"         {answer}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults noticed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
