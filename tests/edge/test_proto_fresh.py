"""The schema: its generated code is fresh, and it names what messages.py names."""

import subprocess
import sys
from pathlib import Path

import pytest

import fedsplit.transport
from fedsplit.transport import fedsplit_pb2 as pb
from fedsplit.transport.frames import CALLS
from fedsplit.wire import messages as m
from fedsplit.wire.codec import DTYPES, traveling

FOLDER = Path(fedsplit.transport.__file__).parent
BODIES = [cls for call in CALLS.values() for cls in (call.request, call.reply)]


def test_the_generated_code_is_fresh(tmp_path: Path) -> None:
    proto = "fedsplit/transport/fedsplit.proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{FOLDER.parents[1]}"]
    command += [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", proto]
    subprocess.run(command, check=True)
    for name in ("fedsplit_pb2.py", "fedsplit_pb2.pyi"):
        fresh = (tmp_path / "fedsplit" / "transport" / name).read_text()
        assert (FOLDER / name).read_text() == fresh, f"{name} is stale; run `make proto`"


@pytest.mark.parametrize("cls", [*BODIES, m.Limits], ids=lambda cls: cls.__name__)
def test_a_message_has_the_fields_of_its_dataclass(cls: type) -> None:
    names = [field.name for field in traveling(cls)]
    assert [field.name for field in getattr(pb, cls.__name__).DESCRIPTOR.fields] == names


def test_every_request_has_a_method_and_every_dtype_a_number() -> None:
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["ComputeService"].methods}
    assert methods == {"Exchange", *(call.method for call in CALLS.values())}
    assert {cls.__name__ for cls in CALLS} == {cls.__name__ for cls in m.Request.__subclasses__()}
    assert set(pb.DType.keys()) == {"DTYPE_UNSPECIFIED", *(name.upper() for name in DTYPES)}
