"""The bytes on the wire are the golden ones, and the golden bytes decode to the same messages.

The other tests encode and decode with the same code, so they pass when both ends change together.
A new build must still understand an old one, so any difference here means a new `PROTOCOL`.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.message import Message
from torch import Tensor

from fedsplit import errors
from fedsplit.errors import FedsplitError
from fedsplit.transport import fedsplit_pb2 as pb
from fedsplit.transport.frames import CALLS, SERVICE, Body, Reader, to_frame, to_frames
from fedsplit.transport.status import TOKEN_KEY
from fedsplit.wire import messages as m
from fedsplit.wire import server_messages as s
from fedsplit.wire.codec import DTYPES, traveling
from fedsplit.wire.compression import NUMBERS
from tests.edge.echo import TOKEN, EchoService, serving

Golden = Callable[[str, object], Any]

MANY = (1 << 53) + 1  # more than fits in 32 bits, or in a double
LIMITS = m.Limits(
    max_rows=32, max_tokens=4096, hidden_size=4096, session_tokens=MANY, stateless_bytes=1 << 40
)
NO_LIMITS = m.Limits(max_rows=0, max_tokens=0, hidden_size=0, session_tokens=0, stateless_bytes=0)


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers that every float dtype holds, of different sizes within 23 that follow another."""
    numbers = (torch.arange(torch.Size(shape).numel()) * 7 % 23 - 11.25).view(shape)
    return numbers.gt(0) if dtype is torch.bool else numbers.to(dtype)


EVERY_DTYPE = tuple(values(1, 3, dtype=dtype) for dtype in DTYPES.values())
EVERY_RANK = (values(2), values(2, 3), values(2, 1, 3), values(1, 2, 1, 3))
ENTRY = m.KVCacheEntry(block=2, keys_BHTE=values(1, 2, 2, 3), values_BHTE=-values(1, 2, 2, 3))
NOT_COUNTED = dict(session="s-1", call=3, training=False)

MESSAGES: dict[str, Body] = {
    "open_request": m.OpenRequest(
        protocol=4,
        client="client-0",
        model="model",
        config="config",
        hidden_size=4096,
        round=MANY,
        training=True,
        generating=True,
        cache_tokens=512,
        served_model_name="gpt2",
    ),
    "open_request with its identity and settings": m.OpenRequest(
        protocol=4,
        client="client-0",
        model="model",
        config="config",
        hidden_size=4096,
        round=0,
        training=True,
        identity={"sample": "0123456789abcdef"},
        model_settings={"rope_parameters.rope_theta": "10000"},
        run_settings={"train.lr": "0.1"},
    ),
    "open_request of a client that comes back": m.OpenRequest(
        protocol=4,
        client="client-0",
        model="model",
        config="config",
        hidden_size=4096,
        round=0,
        training=True,
        last_instance_id="i-0",
    ),
    "open_request with defaults": m.OpenRequest(
        protocol=0, client="", model="", config="", hidden_size=0, round=0, training=False
    ),
    "open_reply": m.OpenReply(
        session="s-1", server_instance_id="i-1", version=MANY, limits=LIMITS, autocast="float16"
    ),
    "open_reply of a trunk that saves its state": m.OpenReply(
        session="s-1",
        server_instance_id="i-1",
        version=3,
        limits=LIMITS,
        save_every=50,
        kept_version=2,
    ),
    "open_reply with defaults": m.OpenReply(
        session="",
        server_instance_id="",
        version=0,
        limits=NO_LIMITS,
    ),
    "forward_request": m.ForwardRequest(
        session="s-1",
        call=MANY,
        training=True,
        smashed_BTD=values(2, 3, 8),
        attention_mask_BT=values(2, 3, dtype=torch.bool),
        position_ids_BT=torch.arange(6).view(2, 3),
        codec="bf16",
        bases_B=torch.tensor([-1, 1 << 40]),
        references=(values(2, 3, 8).bfloat16(), -values(2, 3, 8).bfloat16()),
    ),
    "forward_request with defaults": m.ForwardRequest(**NOT_COUNTED, smashed_BTD=values(1, 1, 1)),
    "forward_request of another mode that repeats one": m.ForwardRequest(
        **NOT_COUNTED, smashed_BTD=values(1, 1, 1), other_mode=True, calls_ago=2
    ),
    "forward_request in the precision of its client": m.ForwardRequest(
        **NOT_COUNTED, smashed_BTD=values(1, 1, 1), autocast="bfloat16"
    ),
    "forward_reply": m.ForwardReply(trunk_out_BTD=values(2, 3, 8), version=MANY, codec="fp16"),
    "forward_reply with defaults": m.ForwardReply(trunk_out_BTD=values(1, 1, 1), version=0),
    "backward_request": m.BackwardRequest(
        session="s-1", call=MANY, want_grad=True, grad_trunk_out_BTD=values(2, 3, 8), codec="bf16"
    ),
    "backward_request with defaults": m.BackwardRequest(
        session="", call=0, want_grad=False, grad_trunk_out_BTD=values(1, 1, 1)
    ),
    "backward_reply": m.BackwardReply(
        grad_smashed_BTD=values(2, 3, 8), trunk_sq_norm=0.1, codec="fp16"
    ),
    "backward_reply with defaults": m.BackwardReply(grad_smashed_BTD=None, trunk_sq_norm=0.0),
    "step_request": m.StepRequest(
        session="s-1", call=MANY, step=3, num_tokens=MANY, client_sq_norm=0.1, loss_scale=65536.0
    ),
    "step_request with defaults": m.StepRequest(
        session="", call=0, step=0, num_tokens=0, client_sq_norm=0.0
    ),
    "contribute_request": s.ContributeRequest(
        session="s-1",
        call=MANY,
        step=MANY,
        num_tokens=MANY,
        client_sq_norm=0.5,
        loss_scale=1024.0,
        num_positions=MANY,
        barrier_version=MANY,
        names=("bias", "weight"),
        gradients=(values(3), values(2, 3)),
    ),
    "contribute_request with defaults": s.ContributeRequest(
        session="",
        call=0,
        step=0,
        num_tokens=0,
        client_sq_norm=0.0,
        loss_scale=0.0,
        num_positions=0,
        barrier_version=0,
        names=(),
        gradients=(),
    ),
    "parameters_request": s.ParametersRequest(
        follower="server-1",
        server_instance_id="i-1",
        version=MANY,
        wait_s=2.5,
        served_model_name="gpt2",
    ),
    "parameters_request with defaults": s.ParametersRequest(
        follower="", server_instance_id="", version=0, wait_s=0.0
    ),
    "parameters_reply": s.ParametersReply(
        server_instance_id="i-1",
        version=MANY,
        barrier_version=MANY,
        names=("bias", "weight"),
        parameters=(values(3), values(2, 3)),
    ),
    "parameters_reply with defaults": s.ParametersReply(
        server_instance_id="", version=0, barrier_version=0, names=(), parameters=()
    ),
    "work_report_request": s.WorkReportRequest(
        session="s-1", positions=MANY, clipped=1, refused=2, quarantines=3
    ),
    "work_report_request with defaults": s.WorkReportRequest(
        session="", positions=0, clipped=0, refused=0, quarantines=0
    ),
    "work_report_reply": s.WorkReportReply(),
    "step_reply": m.StepReply(version=MANY),
    "step_reply with defaults": m.StepReply(version=0),
    "generate_request": m.GenerateRequest(
        session="s-1",
        call=MANY,
        past=2,
        logits_to_keep=1,
        smashed_BTD=values(1, 3, 8),
        rows_B=torch.tensor([0]),
        attention_mask_BT=values(1, 5, dtype=torch.bool),
        position_ids_BT=torch.arange(3).view(1, 3),
        record_past=True,
        stateless=True,
        entries=(ENTRY, ENTRY),
    ),
    "generate_request with defaults": m.GenerateRequest(
        session="", call=0, past=0, logits_to_keep=0, smashed_BTD=values(1, 1, 1)
    ),
    "generate_request in the precision of its client": m.GenerateRequest(
        session="",
        call=0,
        past=0,
        logits_to_keep=0,
        smashed_BTD=values(1, 1, 1),
        autocast="bfloat16",
    ),
    "generate_request of a copy": m.GenerateRequest(
        session="s-2",
        call=0,
        past=2,
        logits_to_keep=1,
        smashed_BTD=values(1, 1, 1),
        source="s-1",
        source_call=MANY,
    ),
    "generate_reply": m.GenerateReply(trunk_out_BTD=values(1, 1, 8), entries=(ENTRY,)),
    "generate_reply with defaults": m.GenerateReply(trunk_out_BTD=values(1, 1, 1)),
    "close_request": m.CloseRequest(session="s-1"),
    "close_request with defaults": m.CloseRequest(session=""),
    "close_reply": m.CloseReply(),
    "gradients_request": m.GradientsRequest(session="s-1", tensors=True),
    "gradients_request with defaults": m.GradientsRequest(session="", tensors=False),
    # Protobuf does not promise the order of a map's entries, so there is one.
    "gradients_reply": m.GradientsReply(
        norms={"block.0": 0.1}, names=("bias", "weight"), gradients=(values(3), values(2, 3))
    ),
    "gradients_reply with every dtype": m.GradientsReply(norms={}, names=(), gradients=EVERY_DTYPE),
    "gradients_reply with every rank": m.GradientsReply(norms={}, names=(), gradients=EVERY_RANK),
    "gradients_reply with defaults": m.GradientsReply(norms={}, names=(), gradients=()),
    "training_state_request": m.TrainingStateRequest(session="s-1"),
    "training_state_request with defaults": m.TrainingStateRequest(session=""),
    "training_state_reply": m.TrainingStateReply(round=MANY, step=3, lr=0.1, version=MANY),
    "training_state_reply with defaults": m.TrainingStateReply(round=0, step=0, lr=0.0, version=0),
    "service_info_request": m.ServiceInfoRequest(served_model_name="gpt2"),
    "service_info_request with defaults": m.ServiceInfoRequest(),
    "service_info_reply": m.ServiceInfoReply(
        protocol=4,
        server_instance_id="i-1",
        model="model",
        family="GPT2",
        blocks="1-2",
        version=MANY,
        sessions=3,
        limits=LIMITS,
        served_model_names=("gpt2", "llama"),
    ),
    "service_info_reply with budgets": m.ServiceInfoReply(
        protocol=m.PROTOCOL,
        server_instance_id="i1",
        model="m",
        family="gpt2",
        blocks="1/2/1",
        version=0,
        sessions=1,
        limits=LIMITS,
        served_model_names=(),
        budgets={"limits.sessions": "1 of 1024"},
    ),
    "service_info_reply with versions": m.ServiceInfoReply(
        protocol=m.PROTOCOL,
        server_instance_id="i1",
        model="m",
        family="gpt2",
        blocks="1/2/1",
        version=0,
        sessions=1,
        limits=LIMITS,
        served_model_names=(),
        versions={"torch": "2.13.0+cpu"},
        time_s=1.75e9,
    ),
    "service_info_reply with defaults": m.ServiceInfoReply(
        protocol=0,
        server_instance_id="",
        model="",
        family="",
        blocks="",
        version=0,
        sessions=0,
        limits=NO_LIMITS,
        served_model_names=(),
    ),
    "error": errors.StaleVersion("moved on", retry_after_s=0.25),
    "error with defaults": errors.Internal(""),
}
"""Messages whose tensors come back exactly, with each field set and with what may be left out."""

CODECS = {
    name: m.ForwardReply(trunk_out_BTD=values(1, 2, 20), version=1, codec=name)
    for name in (
        *("bf16", "fp16", "int8", "int8:stochastic", "int4", "int4:stochastic"),
        *("topk:0.3", "randtopk:0.6", "huffman:0.5", "lowrank:0.5"),
    )
}
CODECS["int4 of an odd width"] = m.ForwardReply(
    trunk_out_BTD=values(1, 2, 7), version=1, codec="int4"
)
CODECS["int8 of bfloat16"] = m.ForwardReply(
    trunk_out_BTD=values(1, 2, 20).bfloat16(), version=1, codec="int8"
)
CODECS["int8 of a difference"] = m.ForwardReply(
    trunk_out_BTD=values(1, 2, 20), version=1, codec="int8", base_BTD=values(2, 20).flip(0)
)
CODECS["huffman:0.5 of a difference"] = m.ForwardReply(
    trunk_out_BTD=values(1, 2, 20), version=1, codec="huffman:0.5", base_BTD=values(2, 20).flip(0)
)
"""Messages whose tensor is compressed."""

TRACED, TRACE = m.CloseRequest(session="s1"), bytes(range(24))
"""A request in a trace, and the ids of the trace and the span."""

LONG = m.ForwardReply(trunk_out_BTD=values(2, 700, 200), version=1)
"""A message of a little more than 1 MiB."""

ERRORS = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, FedsplitError) and cls is not FedsplitError
]


def hexed(message: Body, **options: int) -> list[str]:
    return [frame.hex() for frame in to_frames(message, **options)]


def read(frames: list[str]) -> Any:
    """The message of frames in hexadecimal."""
    reader = Reader(1 << 24)
    *before, last = [reader.feed(bytes.fromhex(frame)) for frame in frames]
    assert before == [None] * len(before)
    return last


def plain(value: Any) -> Any:
    """A message as values that `==` compares: its class and fields, dtypes and lists."""
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, FedsplitError):
        return type(value), str(value), value.retry_after_s
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, m.Request | m.Reply | m.KVCacheEntry):
        return type(value), {f.name: plain(getattr(value, f.name)) for f in traveling(value)}
    return value


def test_every_message_is_the_golden_frame(golden: Golden) -> None:
    got = {
        "protocol": m.PROTOCOL,
        "methods": {
            call.request.__name__: [f"/{SERVICE}/{call.method}", call.reply.__name__, call.streams]
            for call in CALLS.values()
        },
        "token": TOKEN_KEY,
        "messages": {name: to_frame(message).hex() for name, message in MESSAGES.items()},
    }
    expected = golden("wire_messages", got)
    assert got == expected
    for name, message in MESSAGES.items():
        assert plain(read([expected["messages"][name]])) == plain(message), name


def test_a_long_message_is_the_golden_chunks(golden: Golden) -> None:
    short = MESSAGES["forward_reply"]
    got = {
        "32 bytes": hexed(short, chunk_bytes=32),
        "1 MiB": [
            {"bytes": len(frame), "sha256": hashlib.sha256(frame).hexdigest(), "head": head.hex()}
            for frame in to_frames(LONG)
            for head in [frame[:64]]
        ],
    }
    expected = golden("wire_chunks", got)
    assert got == expected
    assert len(got["1 MiB"]) == 2
    assert plain(read(expected["32 bytes"])) == plain(short)
    assert plain(read(hexed(LONG))) == plain(LONG)


def test_every_codec_makes_the_golden_bytes(golden: Golden) -> None:
    frames = {name: to_frame(message).hex() for name, message in CODECS.items()}
    decoded = {name: read([frame]).trunk_out_BTD for name, frame in frames.items()}
    got = {
        name: {"frame": frame, "float32": decoded[name].float().numpy().tobytes().hex()}
        for name, frame in frames.items()
    }
    expected = golden("wire_codecs", got)
    for name, told in expected.items():
        back = read([told["frame"]]).trunk_out_BTD
        assert back.float().numpy().tobytes().hex() == told["float32"], name
        assert back.dtype == CODECS[name].trunk_out_BTD.dtype
    assert without_deflated(got) == without_deflated(expected)


def without_deflated(told: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The cases without the frames of `huffman`, whose values are compared all the same.

    A deflate stream is what the zlib of this machine makes of the symbols: another zlib may make
    another one, which says the same. Of `lowrank` only the decoding is compared, because another
    matrix library rounds its components otherwise.
    """
    return {
        name: {key: text for key, text in case.items() if key != "frame" or "huffman" not in name}
        for name, case in told.items()
        if "lowrank" not in name
    }


def test_every_error_has_the_golden_frame_and_trailers(golden: Golden) -> None:
    got = {}
    service = EchoService()
    with serving(service) as address, grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary(f"/{SERVICE}/GetServiceInfo", bytes, bytes)
        for cls in ERRORS:
            service.refusal = cls("a line, \u00e4\nand another", retry_after_s=1.5)
            with pytest.raises(grpc.RpcError) as caught:
                ask(to_frame(m.ServiceInfoRequest()), metadata=((TOKEN_KEY, TOKEN),))
            told = dict(caught.value.trailing_metadata())
            got[cls.__name__] = {
                "frame": to_frame(service.refusal).hex(),
                "status": caught.value.code().name,
                "trailers": {key: told[key] for key in sorted(told) if key.startswith("fedsplit-")},
            }
    expected = golden("wire_errors", got)
    assert got == expected
    for cls in ERRORS:
        error = read([expected[cls.__name__]["frame"]])
        # A peer's text becomes one line.
        assert plain(error) == (cls, "a line, \u00e4 and another", 1.5)


def written(message: Message) -> Iterator[str]:
    """The fields, enum values and codecs that a message of protobuf carries, by name."""
    for field, value in message.ListFields():
        yield field.full_name
        if field.full_name == "fedsplit.v1.TensorMeta.codec":
            yield f"codec {value}"
        if field.enum_type:
            yield f"{field.enum_type.name}.{field.enum_type.values_by_number[value].name}"
        elif field.message_type and not field.message_type.GetOptions().map_entry:
            for item in [value] if isinstance(value, Message) else value:
                yield from written(item)


def test_every_call_field_dtype_and_codec_has_a_golden_case() -> None:
    schema = pb.DESCRIPTOR
    needed = {f.full_name for each in schema.message_types_by_name.values() for f in each.fields}
    for enum in schema.enum_types_by_name.values():
        needed |= {f"{enum.name}.{value.name}" for value in enum.values if value.number}
    needed |= {f"codec {number}" for name, number in NUMBERS.items() if name != "none"}
    frames = [to_frame(message) for message in [*MESSAGES.values(), *CODECS.values()]]
    frames += to_frames(LONG)
    frames.append(to_frame(TRACED, TRACE))
    assert {name for frame in frames for name in written(pb.Frame.FromString(frame))} == needed
    classes = {cls for call in CALLS.values() for cls in (call.request, call.reply)}
    assert {type(message) for message in MESSAGES.values()} >= classes
    with_fields = {each.name for each in pb.Header.DESCRIPTOR.oneofs_by_name["body"].fields}
    with_fields -= {"chunk", "close_reply", "work_report_reply"}
    assert with_fields <= {name.removesuffix(" with defaults") for name in MESSAGES}
    assert {f"{name} with defaults" for name in with_fields} <= set(MESSAGES)
