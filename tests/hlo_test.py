"""benchmarks.hlo: what is counted in the text of a program, on programs written by hand."""

import pytest

from benchmarks import hlo

# A convolution of 4 images, as XLA writes it for GPUs: its kernel is transposed before, its result
# is rectified after. One fusion has no name of its own, only what is inside.
STEP = """\
HloModule jit_one, is_scheduled=true, entry_computation_layout={(bf16[4,8,8,16]{3,2,1,0})->f32[4]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_transpose (param_0: f32[3,3,16,32]) -> bf16[32,3,3,16] {
  %param_0 = f32[3,3,16,32]{3,2,1,0} parameter(0)
  %turned = f32[32,3,3,16]{3,2,1,0} transpose(%param_0), dimensions={3,0,1,2}
  ROOT %narrow = bf16[32,3,3,16]{3,2,1,0} convert(%turned)
}

%fused_maximum (param_0.1: bf16[4,8,8,32]) -> bf16[4,8,8,32] {
  %param_0.1 = bf16[4,8,8,32]{3,2,1,0} parameter(0)
  %zero = bf16[] constant(0)
  %zeros = bf16[4,8,8,32]{3,2,1,0} broadcast(%zero), metadata={op_name="jit(one)/jvp(Net)/last/max"}
  ROOT %max = bf16[4,8,8,32]{3,2,1,0} maximum(%param_0.1, %zeros), metadata={op_name="jit(one)/jvp(Net)/last/max"}
}

ENTRY %main.1 (x: bf16[4,8,8,16], kernel: f32[3,3,16,32]) -> (bf16[4,8,8,32], f32[3,3,16,32]) {
  %x = bf16[4,8,8,16]{3,2,1,0} parameter(0), metadata={op_name="batch['image']"}
  %kernel = f32[3,3,16,32]{3,2,1,0} parameter(1)
  %copy.1 = f32[3,3,16,32]{3,2,1,0} copy(%kernel)
  %turn = bf16[32,3,3,16]{3,2,1,0} fusion(%copy.1), kind=kInput, calls=%fused_transpose
  %conv.1 = (bf16[4,8,8,32]{3,2,1,0}, u8[1000]{0}) custom-call(%x, /*index=1*/%turn), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", metadata={op_name="jit(one)/jvp(Net)/first/conv/conv_general_dilated"}
  %get.1 = bf16[4,8,8,32]{3,2,1,0} get-tuple-element(%conv.1), index=0
  %bitcast.1 = bf16[4,8,8,32]{3,2,1,0} bitcast(%get.1)
  %max.1 = bf16[4,8,8,32]{3,2,1,0} fusion(%bitcast.1), kind=kLoop, calls=%fused_maximum
  %twice = bf16[4,8,8,32]{3,2,1,0} add(%max.1, %max.1), metadata={op_name="jit(one)/transpose(jvp(Net))/last/transpose()/add_any;jit(one)/other"}
  ROOT %out = (bf16[4,8,8,32]{3,2,1,0}, f32[3,3,16,32]{3,2,1,0}) tuple(%twice, %copy.1)
}
"""  # noqa: E501
KERNEL = 3 * 3 * 16 * 32
IMAGES = 4 * 8 * 8 * 16
FEATURES = 4 * 8 * 8 * 32


def test_sizes_of_shapes():
    assert hlo.size("f32[3,4]{1,0}") == 48
    assert hlo.size("bf16[]") == 2
    assert hlo.size("pred[0]{0}") == 0
    assert hlo.size("(f32[2]{0}, /*index=1*/(u8[3]{0:T(8)}, s64[]), token[])") == 8 + 3 + 8
    with pytest.raises(KeyError, match="f4"):
        hlo.size("f4[8]")


def test_a_closing_parenthesis_is_found():
    assert hlo.closing("%a, (%b)), kind=(x)") == 8
    with pytest.raises(ValueError, match="never closed"):
        hlo.closing("%a, (%b)")


def test_kernels_are_what_is_executed_but_for_names_of_memory():
    items = hlo.executed(STEP)
    assert [item.instruction.name for item in items] == [
        "copy.1",
        "turn",
        "conv.1",
        "max.1",
        "twice",
    ]
    assert [item.kind for item in items] == [
        "copy",
        "fusion kInput",
        "__cudnn$convForward",
        "fusion kLoop",
        "add",
    ]
    assert {item.times for item in items} == {1}


def test_bytes_are_operands_and_results_without_scratch():
    moved = {item.instruction.name: item.bytes for item in hlo.executed(STEP)}
    assert moved == {
        "copy.1": 4 * KERNEL + 4 * KERNEL,
        "turn": 4 * KERNEL + 2 * KERNEL,
        "conv.1": 2 * IMAGES + 2 * KERNEL + 2 * FEATURES,  # without u8[1000]
        "max.1": 2 * FEATURES + 2 * FEATURES,
        "twice": 2 * FEATURES + 2 * FEATURES,  # the operand is read once
    }


SLICED = """\
HloModule sliced

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_slice (p1: f32[8], p0: bf16[64,8], p2: f32[64,4]) -> (f32[4,8], f32[4]) {
  %p1 = f32[8]{0} parameter(1)
  %all = f32[4,8]{1,0} broadcast(%p1), dimensions={1}
  %p0 = bf16[64,8]{1,0} parameter(0)
  %wide = f32[64,8]{1,0} convert(%p0)
  %rows = f32[4,8]{1,0} slice(%wide), slice={[0:4], [0:8]}
  %same = f32[2,8]{1,0} slice(%wide), slice={[0:2], [0:8]}
  %turned = f32[8,2]{1,0} transpose(%same), dimensions={1,0}
  %less = f32[4,8]{1,0} subtract(%rows, %all)
  %p2 = f32[64,4]{1,0} parameter(2)
  %zero = f32[] constant(0)
  %total = f32[4]{0} reduce(%p2, %zero), dimensions={0}, to_apply=%add
  ROOT %both = (f32[4,8]{1,0}, f32[4]{0}, f32[8,2]{1,0}) tuple(%less, %total, %turned)
}

ENTRY %main (x: bf16[64,8], y: f32[8], z: f32[64,4]) -> f32[4,8] {
  %x = bf16[64,8]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %z = f32[64,4]{1,0} parameter(2)
  %f = (f32[4,8]{1,0}, f32[4]{0}, f32[8,2]{1,0}) fusion(%x, %y, %z), kind=kLoop, calls=%fused_slice
  %first = f32[4,8]{1,0} get-tuple-element(%f), index=0
  ROOT %cut = f32[1,8]{1,0} slice(%first), slice={[0:1], [0:8]}
}
"""


def test_of_what_is_only_sliced_the_slices_are_touched():
    fused, cut = hlo.executed(SLICED)
    result = 4 * (32 + 4 + 16)
    assert fused.bytes == 2 * 64 * 8 + 4 * 8 + 4 * 64 * 4 + result
    # Two slices of x, of 4 and 2 rows; the whole of the vector and of what is summed.
    assert fused.touched == 2 * 6 * 8 + 4 * 8 + 4 * 64 * 4 + result
    assert (cut.bytes, cut.touched) == (4 * 32 + 4 * 8, 4 * 8 + 4 * 8)
    assert all(item.touched == item.bytes for item in hlo.executed(STEP))


def test_an_item_has_the_layer_of_its_name_its_inside_or_its_user():
    layers = {item.instruction.name: item.layer for item in hlo.executed(STEP)}
    assert layers == {
        "copy.1": "first/conv",
        "turn": "first/conv",
        "conv.1": "first/conv",
        "max.1": "last",
        "twice": "backward last",
    }


def test_the_summary_has_what_was_counted():
    found = hlo.summary(STEP, images=4)
    assert found["kernels"] == 5 and found["copies"] == 1
    assert found["bytes_an_image"] == (18 * KERNEL - 2 * KERNEL + 2 * IMAGES + 10 * FEATURES) // 4
    assert isinstance(found["bytes_an_image"], int)
    assert found["touched_an_image"] == found["bytes_an_image"]
    assert found["convolutions"] == {"convForward bf16 x bf16 -> bf16, b01f_o01i->b01f": 1}
    assert found["kinds"]["copy"] == {"kernels": 1, "bytes_an_image": 2 * KERNEL}
    assert sum(kind["kernels"] for kind in found["kinds"].values()) == 5
    largest = found["largest"]
    assert [item["name"] for item in largest[:2]] == ["copy.1", "conv.1"]
    assert largest[1] == {
        "name": "conv.1",
        "kind": "__cudnn$convForward",
        "times": 1,
        "bytes_an_image": (2 * IMAGES + 2 * KERNEL + 2 * FEATURES) // 4,
        "layer": "first/conv",
    }


LOOPS = """\
HloModule loops

%body (state: (s32[], f32[100])) -> (s32[], f32[100]) {
  %state = (s32[], f32[100]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %v = f32[100]{0} get-tuple-element(%state), index=1
  %next = s32[] add(%i, %i)
  %inner = f32[100]{0} call(%v), to_apply=%called
  ROOT %pair = (s32[], f32[100]{0}) tuple(%next, %inner)
}

%condition (state.1: (s32[], f32[100])) -> pred[] {
  %state.1 = (s32[], f32[100]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

%called (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  %once = f32[100]{0} negate(%p)
  ROOT %again = f32[100]{0} exponential(%once)
}

%short (q: f32[100]) -> f32[100] {
  %q = f32[100]{0} parameter(0)
  ROOT %same = f32[100]{0} copy(%q)
}

ENTRY %main (start: (s32[], f32[100]), case: s32[]) -> f32[100] {
  %start = (s32[], f32[100]{0}) parameter(0)
  %case = s32[] parameter(1)
  %loop = (s32[], f32[100]{0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %v.1 = f32[100]{0} get-tuple-element(%loop), index=1
  ROOT %either = f32[100]{0} conditional(%case, %v.1, %v.1), branch_computations={%short, %called}
}
"""  # noqa: E501


def test_loops_calls_and_branches_count_as_often_as_they_run():
    times = [(item.instruction.name, item.times) for item in hlo.executed(LOOPS)]
    assert times == [
        ("less", 6),
        ("next", 5),
        ("once", 5),
        ("again", 5),
        ("once", 1),  # the branch with the most instructions
        ("again", 1),
    ]
    found = hlo.summary(LOOPS, images=1)
    assert found["kernels"] == 6 + 5 * 3 + 2
    vectors = 2 * (5 + 1) * 2 * 400
    assert found["bytes_an_image"] == 6 * (4 + 4 + 1) + 5 * (4 + 4) + vectors
    assert found["largest"][0]["times"] == 5 and found["largest"][0]["bytes_an_image"] == 5 * 800


def test_a_loop_of_unknown_length_counts_once():
    unknown = LOOPS.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    assert hlo.summary(unknown, images=1)["kernels"] == 2 + 3 + 2


def test_branches_of_a_predicate_are_found():
    two = LOOPS.replace(
        "branch_computations={%short, %called}",
        "true_computation=%short, false_computation=%called",
    )
    assert two != LOOPS and hlo.executed(two) == hlo.executed(LOOPS)


def test_sorts_are_told_from_other_fusions():
    text = """\
%sorting (k: s32[8]) -> s32[8] {
  %k = s32[8]{0} parameter(0)
  ROOT %sorted = s32[8]{0} sort(%k), dimensions={0}, to_apply=%less
}

ENTRY %main (k.1: s32[8]) -> s32[8] {
  %k.1 = s32[8]{0} parameter(0)
  ROOT %fusion = s32[8]{0} fusion(%k.1), kind=kCustom, calls=%sorting
}
"""
    assert hlo.summary(text, images=1)["kinds"] == {
        "fusion kCustom sort": {"kernels": 1, "bytes_an_image": 64}
    }


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.executed("HloModule empty\n")
