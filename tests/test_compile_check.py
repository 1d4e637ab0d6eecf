"""What compile_check.py reads from compiled programs, and what cost_model.py computes."""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnemonic_jax import models
from mnemonic_jax.models import vit as vit_model
from mnemonic_jax.multihost import sharding
from mnemonic_jax.runs import config as configs

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "experiments/imagenet_vit/scaling"))
import compile_check
import cost_model
import hlo
from chips import CHIPS

# From a train step compiled for v5e:4x4, cut to the lines and words that count.
TPU = """HloModule jit_step, is_scheduled=true

%fused_computation.1258 (param_0.4500: bf16[1,48,384]) -> bf16[1,384,384] {
  %param_0.4500 = bf16[1,48,384]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.49 = bf16[1,384,384]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.4500), \
channel_id=5, replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=1,'axis_3'=2], \
device_ids=([2,8]T(1,0)) {'axis_1'}, dimensions={1}
}

%async_collective_fusion.793 (param_0.4505: bf16[1,48,384]) -> bf16[1,384,384] {
  %param_0.4505 = bf16[1,48,384]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.51 = bf16[1,384,384]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.4505), \
channel_id=5, replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=1,'axis_3'=2], \
device_ids=([2,8]T(1,0)) {'axis_1'}, dimensions={1}
}

%wide.region_15.23_spmd (wide.param.22: (s32[], bf16[64,196,384])) -> pred[] {
  %constant.1301.clone.1 = s32[]{:T(128)} constant(12)
  %wide.param.22 = (s32[]{:T(128)}, bf16[64,196,384]{2,1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %get-tuple-element.1735 = s32[]{:T(128)} get-tuple-element(%wide.param.22), index=0
  ROOT %lt.62 = pred[]{:T(512)} compare(%get-tuple-element.1735, %constant.1301.clone.1), \
direction=LT
}

%wide.region_8.22_spmd.sunk (wide.param.21: (s32[], bf16[64,196,384])) -> (s32[], \
bf16[64,196,384]) {
  %wide.param.21 = (s32[]{:T(128)}, bf16[64,196,384]{2,1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %fusion.1 = bf16[1,384,384]{2,1,0:T(8,128)(2,1)} fusion(%wide.param.21), kind=kCustom, \
calls=%fused_computation.1258, metadata={op_name="jit(step)/jvp()/while/body/squeeze" \
stack_frame_id=239}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %fusion.2 = bf16[1,384,384]{2,1,0:T(8,128)(2,1)} fusion(%fusion.1), kind=kCustom, \
calls=%async_collective_fusion.793, backend_config={"window_config":{"estimated_cycles":"500"}}
  %all-reduce.52 = (bf16[384]{0:T(512)(128)(2,1)S(1)}, bf16[384,384]{1,0:T(8,128)(2,1)S(1)}, \
/*index=2*/bf16[1152]{0:T(1024)(128)(2,1)S(1)}) all-reduce(%copy-done.84, %copy-done.86, \
%get-tuple-element.2150), channel_id=15, replica_groups=mesh['axis_0'=16,'axis_1'=1,'axis_2'=1] \
{'axis_0','axis_1'}, to_apply=%add
  ROOT %tuple = (s32[]{:T(128)}, bf16[64,196,384]{2,1,0:T(8,128)(2,1)S(1)}) tuple(%wide.param.21)
}

%region_2.8_spmd.clone (param.127: (u32[64,2], f32[64])) -> pred[] {
  %param.127 = (u32[64,2]{0,1:T(2,128)S(1)}, f32[64]{0:T(128)S(1)}) parameter(0)
  %all-reduce.30 = u32[]{:T(128)} all-reduce(%bitcast.158), channel_id=1, \
replica_groups=mesh['axis_0'=16] {'axis_0'}, to_apply=%add
  ROOT %bitcast.159 = pred[]{:T(512)} bitcast(%all-reduce.30)
}

%region_1.6_spmd.clone (param.126: (u32[64,2], f32[64])) -> (u32[64,2], f32[64]) {
  ROOT %param.126 = (u32[64,2]{0,1:T(2,128)S(1)}, f32[64]{0:T(128)S(1)}) parameter(0)
}

ENTRY %main.82_spmd (param.1: bf16[64,196,384]) -> bf16[64,196,384] {
  %while.258 = (u32[64,2]{0,1:T(2,128)S(1)}, f32[64]{0:T(128)S(1)}) while(%tuple.9), \
condition=%region_2.8_spmd.clone, body=%region_1.6_spmd.clone
  %collective-permute-start.1 = (f32[1,224,224,3]{2,1,3,0:T(8,128)}, \
f32[1,224,224,3]{2,1,3,0:T(8,128)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%slice.304), channel_id=30, source_target_pairs={{0,15},{1,0}}
  %collective-permute-done.1 = f32[1,224,224,3]{2,1,3,0:T(8,128)} \
collective-permute-done(%collective-permute-start.1)
  %while.235 = (s32[]{:T(128)}, bf16[64,196,384]{2,1,0:T(8,128)(2,1)S(1)}) while(%tuple.8), \
condition=%wide.region_15.23_spmd, body=%wide.region_8.22_spmd.sunk
  %fusion.9 = f32[64]{0} fusion(%while.235), kind=kLoop, calls=%missing, \
backend_config={"window_config":{"estimated_cycles":"7"}}
  ROOT %get-tuple-element.1 = bf16[64,196,384]{2,1,0:T(8,128)(2,1)S(1)} \
get-tuple-element(%while.235), index=1
}
"""

# From a scan of six layers on 2 x 4 CPU devices: the backward pass keeps what the forward pass
# gathered.
CPU = """HloModule jit_f, is_scheduled=true

%region_0.1_spmd (param.1: (s32[], f32[2,32], f32[6,32,32])) -> (s32[], f32[2,32], f32[6,32,32]) {
  %param.1 = (s32[], f32[2,32]{1,0}, f32[6,32,32]{2,1,0}) parameter(0)
  %all-gather = f32[1,32,32]{2,0,1} all-gather(%wrapped_dynamic-slice), channel_id=1, \
replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=1,'axis_3'=2], device_ids=([2,4]T(1,0)) \
{'axis_1'}, dimensions={1}
  ROOT %tuple.2 = (s32[], f32[2,32]{1,0}, f32[6,32,32]{2,1,0}) tuple(%param.1)
}

%region_1.2_spmd (param.2: (s32[], f32[2,32], f32[6,32,32])) -> pred[] {
  ROOT %param.2 = pred[] parameter(0)
}

ENTRY %main (param: f32[6,8,32]) -> f32[2,32] {
  %while.12 = (s32[], f32[2,32]{1,0}, f32[6,32,32]{2,1,0}) while(%tuple.33), \
condition=%region_1.2_spmd, body=%region_0.1_spmd, \
backend_config={"known_trip_count":{"n":"6"},"known_init_step":{"init":"0","step":"1"}}
  %reduce-scatter.1 = f32[8,32]{1,0} reduce-scatter(%while.12), channel_id=9, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  ROOT %all-reduce.1 = f32[2,32]{1,0} all-reduce(%reduce-scatter.1), channel_id=3, \
replica_groups=[2,4]<=[8], to_apply=%add
}
"""


def test_collectives_of_a_tpu_program():
  found = {(one.kind, one.shapes[0].sizes): one for one in hlo.collectives(hlo.parse(TPU))}
  assert len(found) == 4
  gather = found["all-gather", (1, 384, 384)]  # one channel, though two fusions work on it
  assert (gather.group, gather.times, gather.known, gather.bytes) == (8, 12, True, 384 * 384 * 2)
  assert gather.sent(16) == gather.bytes * 7 / 8
  reduce = found["all-reduce", (384,)]
  assert (reduce.group, reduce.times, reduce.bytes) == (16, 12, 2 * (384 + 384 * 384 + 1152))
  assert reduce.sent(16) == 2 * reduce.bytes * 15 / 16
  permute = found["collective-permute", (1, 224, 224, 3)]
  assert (permute.times, permute.bytes, permute.sent(16)) == (
    1,
    4 * 224 * 224 * 3,
    4 * 224 * 224 * 3,
  )
  unknown = found["all-reduce", ()]  # the loop of a rejection sampler ends when it ends
  assert (unknown.times, unknown.known, unknown.bytes) == (1, False, 4)


def test_collectives_of_a_cpu_program():
  gather, scatter, reduce = (
    sorted(hlo.collectives(hlo.parse(CPU)), key=lambda one: one.kind)[:1]
    + sorted(hlo.collectives(hlo.parse(CPU)), key=lambda one: one.kind, reverse=True)[:2]
  )
  assert (gather.kind, gather.group, gather.times, gather.known) == ("all-gather", 4, 6, True)
  assert (scatter.kind, scatter.group, scatter.bytes) == (
    "reduce-scatter",
    4,
    4 * 4 * 8 * 32,
  )  # its operand
  assert (reduce.kind, reduce.group, reduce.bytes) == ("all-reduce", 4, 4 * 2 * 32)


def test_cycles_count_a_loop_as_often_as_it_runs():
  assert hlo.estimated_cycles(hlo.parse(TPU)) == {
    "body/squeeze bf16[1, 384, 384]": 12 * 1000,
    "fusion bf16[1, 384, 384]": 12 * 500,
    "fusion f32[64]": 7,
  }


def test_a_text_that_is_no_program():
  with pytest.raises(ValueError, match="no ENTRY computation"):
    hlo.parse("nothing")


def leaf(*sizes, parts=4, stacked=True):
  return hlo.Leaf(sizes, (*sizes[:-1], sizes[-1] // parts), stacked)


def test_a_layer_may_be_gathered_and_a_stack_may_not():
  layers = [leaf(12, 384, 384, parts=8), leaf(12, 384, 1536, parts=8)]
  assert hlo.whole(hlo.parse(TPU), layers) == []
  stack = TPU.replace("bf16[1,384,384]", "bf16[12,384,384]")
  assert hlo.whole(hlo.parse(stack), layers) == ["one all-gather makes bf16[12, 384, 384]"]
  transposed = TPU.replace("bf16[1,384,384]{2,1,0", "bf16[384,1,12,384]{2,1,0")
  assert hlo.whole(hlo.parse(transposed), layers) == ["one all-gather makes bf16[384, 1, 12, 384]"]
  fishers = TPU.replace("(bf16[384]{0:T(512)(128)(2,1)S(1)}", "(f32[2,12,384,1536]{0:T(512)}")
  assert hlo.whole(hlo.parse(fishers), layers) == ["one all-reduce makes f32[2, 12, 384, 1536]"]


def test_layers_that_are_gathered_and_kept_are_a_stack_too():
  assert hlo.whole(hlo.parse(CPU), [leaf(6, 32, 32)]) == ["the loop while.12 keeps f32[6, 32, 32]"]
  # What looks like a device's share of another param is passed over.
  assert hlo.whole(hlo.parse(CPU), [leaf(6, 32, 32), leaf(6, 32, 128)]) == []


def test_many_params_in_one_collective_are_the_model():
  layers = [leaf(384, 384, stacked=False), leaf(1152, stacked=False), leaf(64, 64, stacked=False)]
  assert hlo.whole(hlo.parse(TPU), layers) == ["one all-reduce makes bf16[384, 384], bf16[1152]"]
  assert hlo.whole(hlo.parse(TPU), [*layers, leaf(1000, 384, stacked=False)]) == []


def report(**changed):
  memory = {
    "arguments": 2**30,
    "outputs": 0,
    "aliased": 0,
    "temporaries": 2**34,
    "code": 0,
    "used": 17 * 2**30,
  }
  found = hlo.collectives(hlo.parse(TPU))
  return compile_check.Report(
    "train step", 1.0, memory, found, 0.05, {"body/mul f32[8]": 0.02}, 1e12, []
  )._replace(**changed)


def test_what_does_not_fit_is_said():
  (said,) = compile_check.problems([report()], CHIPS["v5e"])
  assert said == "train step: 17.00 GiB a device, and the chip has 16."
  assert compile_check.problems([report()], CHIPS["v6e"]) == []
  (said,) = compile_check.problems([report(whole=["one all-gather makes f32[12, 8]"])], None)
  assert said == (
    "train step: every device gets a whole stack of layers, or the model: "
    "one all-gather makes f32[12, 8]."
  )


def test_the_table_counts_bytes_by_kind():
  lines = compile_check.table(report(), 16, CHIPS["v5e"]).splitlines()
  assert "used 17.000 of 16" in lines[1] and "5.08 ms at the bfloat16 peak" in lines[2]
  assert lines[4].split() == ["20.00", "ms", "body/mul", "f32[8]"]
  (gathers,) = (
    line for line in lines if line.split()[:2] == ["all-gather", "12"] and "sent" in line
  )
  assert gathers.split()[3:] == ["3.38", "MiB", "sent", "2.95", "MiB"]
  assert sum("in loops of unknown length" in line for line in lines) == 1


def test_more_than_the_memory_of_a_chip_is_one_message():
  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\n Used 20G of 15.75G"
      )

  with pytest.raises(
    compile_check.MnemonicError,
    match=r"train step: does not fit, says the compiler: .* Used 20G of",
  ):
    compile_check._compiled("train step", Lowered())


TINY = [
  "--topology",
  "cpu",
  "--model",
  "vit_ti16",
  "--batch",
  "16",
  "--classes",
  "8",
  "--data.side",
  "32",
]


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (
      ["--topology", "v99:4x4"],
      "--topology: got 'v99:4x4'; expected v4, v5e, v5p or v6e and a shape, such as v5e:4x4",
    ),
    (["--topology", "h200:1"], "--topology: got 'h200:1'"),
    ([*TINY, "--fsdp", "3"], "mesh: got data 2 x fsdp 3 for 8 devices; expected a product of 8"),
    (
      [*TINY, "--train.batch_size", "12"],
      "train.batch_size: got 12 for 8 devices; expected a multiple of 8",
    ),
    (
      ["--topology", "cpu", "--config", "imagenet_resnet18"],
      "model.name: got 'resnet18'; expected one of vit_ti16",
    ),
    (["--topology", "cpu", "--config", "vit"], "vit"),
  ],
)
def test_bad_input_is_one_message(arguments, said, capsys):
  assert compile_check.main(arguments) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1


PROGRAMS = ["train step", "forget", "projection", "learning codes", "recalling codes"]


@pytest.mark.long
def test_the_very_programs_compile_here():
  changes = {"model.name": "vit_ti16", "train.batch_size": 16, "data.side": 32}
  config = configs.load(compile_check.CONFIG, changes)
  reports = compile_check.check(config, 10, sharding.make_mesh(2, 4), None)
  step, forgets, projection, learning, recalling = reports
  assert [one.program for one in reports] == PROGRAMS
  assert compile_check.problems(reports, None) == [] and all(
    one.memory["used"] > 0 for one in reports
  )
  assert {"all-gather", "all-reduce"} <= {one.kind for one in step.collectives}
  assert "reduce-scatter" in {one.kind for one in forgets.collectives}
  for one in (forgets, projection, learning, recalling):  # params are gathered a layer at a time,
    gathered = [shape for c in one.collectives for shape in c.shapes if c.kind == "all-gather"]
    assert max(shape.elements for shape in gathered) == 4 * 192 * 192
    # and no pass brings the codes, or what becomes of them, to every device.
    assert not any(32 in shape.sizes for shape in gathered)


@pytest.mark.long
def test_without_remat_every_layer_that_was_gathered_is_kept(capsys):
  assert compile_check.main([*TINY, "--fsdp", "4", "--json", "--model.remat", "false"]) == 1
  out, err = capsys.readouterr()
  found = json.loads(out)
  assert found["mesh"] == {"data": 2, "fsdp": 4}
  assert [one["program"] for one in found["programs"]] == PROGRAMS
  assert found["problems"] and all(f"error: {said}" in err for said in found["problems"])
  assert any(
    said.startswith("train step: every device gets a whole stack") and "keeps" in said
    for said in found["problems"]
  )


PUBLISHED = {
  "vit_ti16": 5_717_416,
  "vit_s16": 22_050_664,
  "vit_b16": 86_567_656,
  "vit_l16": 304_326_632,
  "vit_h14": 632_045_800,
}


@pytest.mark.parametrize("name", cost_model.VITS)
def test_params_on_paper_are_those_published(name):
  vit = cost_model.VITS[name]
  assert (vit.width, vit.depth, vit.heads) == vit_model.SIZES[
    name.removeprefix("vit_").rstrip("0123456789")
  ]
  published = PUBLISHED[name]
  assert vit.params() + 2 * vit.width == published  # those have a class token, and its position


@pytest.mark.parametrize(
  "name",
  [
    "vit_s16",
    *(pytest.param(f"vit_{size}", marks=pytest.mark.long) for size in ("b16", "l16", "h14")),
  ],
)
def test_params_on_paper_are_those_of_the_models(name):
  model = models.make(name, shape=(224, 224, 3), num_classes=1000, pool="mean", scan=True)
  params, _ = jax.eval_shape(model.init, jax.random.key(0))
  vit = cost_model.VITS[name]
  assert sum(x.size for x in jax.tree.leaves(params)) == vit.params()
  assert sum(x.size for x in jax.tree.leaves(params["blocks"])) == vit.depth * vit.layer_params()


def test_flops_on_paper_are_those_that_xla_counts():
  """XLA counts norms, softmax and GELU too."""
  model = models.make("vit_s16", shape=(224, 224, 3), num_classes=1000, pool="mean")
  params, state = jax.eval_shape(model.init, jax.random.key(0))
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  counted = (
    jax.jit(lambda p, x: model.apply(p, state, x, False)[0])
    .lower(params, image)
    .cost_analysis()["flops"]
  )
  assert 0.96 < cost_model.VITS["vit_s16"].forward_flops() / counted < 1


def test_shares_on_paper_are_those_of_the_rules():
  model = models.make("vit_s16", shape=(224, 224, 3), num_classes=1000, pool="mean", scan=True)
  params, _ = jax.eval_shape(model.init, jax.random.key(0))
  placed = sharding.tree_shardings(sharding.make_mesh(2, 4), params)
  share = sum(
    4 * np.prod(p.shard_shape(x.shape))
    for x, p in zip(*map(jax.tree.leaves, (params, placed)), strict=True)
  )
  on_paper = cost_model.state_bytes(cost_model.VITS["vit_s16"].params(), 4)["params"]
  np.testing.assert_allclose(share, on_paper, rtol=0.02)  # small leaves are copied


def test_a_forget_grows_with_its_classes_alone():
  vit, machine = cost_model.VITS["vit_l16"], cost_model.MACHINES[2]
  once, ten = (
    cost_model.forget_seconds(vit, machine, classes, machine.speed.flops)
    for classes in (2048, 20480)
  )
  assert 9.9 < ten / once < 11


def test_the_page_shows_the_tables_that_the_script_makes():
  text = cost_model.PAGE.read_text()
  assert cost_model.filled(text) == text, (
    "run python experiments/imagenet_vit/scaling/cost_model.py --write"
  )
