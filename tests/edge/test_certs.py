"""`fedsplit certs`: what each machine has, who accepts the certificates, and who does not."""

import re
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsplit.certs import pem
from fedsplit.certs.authority import Authority
from fedsplit.certs.request import make_request
from fedsplit.certs.show import is_authority
from fedsplit.cli import main
from fedsplit.errors import ConfigError, TlsFailed
from fedsplit.spec import WireSpec
from fedsplit.wire.messages import ServiceInfoRequest
from tests.edge.certified import certified
from tests.edge.echo import EchoService, linked, serving

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


@pytest.fixture
def machines(tmp_path, monkeypatch) -> Path:
    """A folder with a folder for each machine, which is the working directory."""
    for name in ("authority", "server", "client"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_private_key_leaves_its_machine_and_a_trunk_takes_the_certificate(machines, capsys):
    assert main("certs init --out authority/ca".split()) == 0
    assert main("certs request server.example.org 10.0.0.7 --out server".split()) == 0
    shutil.copy("server/server.csr", "authority")
    keys = {file: file.read_bytes() for file in machines.rglob("*.key")}
    assert main("certs sign authority/server.csr --ca authority/ca".split()) == 0
    shutil.copy("authority/server.crt", "server")
    for machine in ("server", "client"):
        shutil.copy("authority/ca/ca.crt", machine)
    assert {file: file.read_bytes() for file in machines.rglob("*.key")} == keys
    assert sorted(str(file.relative_to(machines)) for file in keys) == [
        "authority/ca/ca.key",
        "server/server.key",
    ]
    assert {stat.S_IMODE(file.stat().st_mode) for file in keys} == {0o600}
    others = [f for f in machines.rglob("*") if f.is_file() and f not in keys]
    assert len(others) == 7 and not [f for f in others if b"PRIVATE" in f.read_bytes()]
    printed = capsys.readouterr().out
    named = "server.example.org, localhost, 10.0.0.7, 127.0.0.1"
    assert f"authority/server.crt: for {named}; valid until {NOW + 365 * DAY:%Y-%m-%d}" in printed
    wire = WireSpec(tls_cert="server/server.crt", tls_key="server/server.key")
    with serving(EchoService(), wire) as address:
        with linked(address, wire=WireSpec(tls_ca="client/ca.crt")) as link:
            assert link.exchange(ServiceInfoRequest()).family == "echo"
        by_name = f"localhost:{address.rpartition(':')[2]}"
        with linked(by_name, wire=WireSpec(tls_ca="client/ca.crt")) as link:
            assert link.exchange(ServiceInfoRequest()).family == "echo"


def refusal(wire: WireSpec, *, tls_ca: str = "") -> str:
    """The error of a client that calls a server with this wire."""
    trust = replace(wire, tls_ca=tls_ca or wire.tls_ca)
    with serving(EchoService(), wire) as address, linked(address, wire=trust) as link:
        with pytest.raises(TlsFailed) as raised:
            link.exchange(ServiceInfoRequest())
    assert str(raised.value).startswith(f"no encrypted connection to {address}: ")
    return str(raised.value)


@pytest.mark.parametrize("name", ["other", "fedsplit authority"], ids=["its own", "the same"])
def test_a_certificate_of_another_authority_is_refused(name, tmp_path):
    # Authorities may have the same name, as all that are made without --name.
    wire = certified(tmp_path / "trunk", authority="fedsplit authority")
    other = certified(tmp_path / "other", authority=name)
    text = refusal(wire, tls_ca=other.tls_ca)
    assert "its certificate is not one of the authority in wire.tls_ca; name" in text


def test_a_server_that_its_certificate_does_not_name_is_refused(tmp_path):
    text = refusal(certified(tmp_path, address="127.0.0.2:0"))
    assert "its certificate does not name this address; call the server by a name" in text


def test_an_expired_certificate_is_refused(tmp_path):
    text = refusal(certified(tmp_path, now=NOW - 2 * DAY, days=1))
    assert "its certificate, or that of its authority, has expired; sign the server's" in text


def test_a_certificate_that_begins_in_the_future_is_refused(tmp_path):
    text = refusal(certified(tmp_path, now=NOW + DAY))
    assert "its certificate begins in the future; correct the clock of this machine" in text


def test_a_certificate_signed_by_a_fast_clock_is_accepted(tmp_path):
    wire = certified(tmp_path, now=NOW + timedelta(minutes=50))
    with serving(EchoService(), wire) as address, linked(address, wire=wire) as link:
        assert link.exchange(ServiceInfoRequest()).family == "echo"


def test_a_request_cannot_make_another_authority(tmp_path):
    asked = (
        x509.CertificateSigningRequestBuilder(pem.common_name("sly"))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("sly.org")]), critical=False)
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    )
    authority = Authority.create(tmp_path, name="a", days=2, now=NOW)
    signed = authority.sign(asked, days=1, now=NOW)
    assert is_authority(authority.certificate) and not is_authority(signed)
    usage = signed.extensions.get_extension_for_class(x509.KeyUsage).value
    assert not usage.key_cert_sign and pem.texts(pem.alternative_names(signed)) == ["sly.org"]


def test_show_tells_what_is_in_a_file(machines, capsys):
    certified(machines / "server")
    capsys.readouterr()
    assert main("certs show server/ca/ca.crt server/server.csr server/server.crt".split()) == 0
    authority, request, certificate = capsys.readouterr().out.split("\n\n")
    assert re.search(r"^authority +server/ca/ca.crt$", authority, re.M) and "names" not in authority
    assert re.search(r"^names +server.example.org, localhost, 127.0.0.1$", request, re.M)
    assert re.search(r"^signed by +CN=.*server$", certificate, re.M)
    assert re.search(r"^valid until +\S+ \S+ UTC, 36[45] days left$", certificate, re.M)
    assert re.search(r"^SHA-256 +(\w\w:){31}\w\w$", certificate, re.M)


def _changed_request(folder: Path) -> None:
    file = folder / "server" / "server.csr"
    der = pem.read_request(file).public_bytes(serialization.Encoding.DER)
    changed = x509.load_der_x509_csr(der.replace(b"server.example.org", b"server.example.com"))
    pem.write(file, changed)


def _key_of_another(folder: Path) -> None:
    certified(folder / "other")
    shutil.copy(folder / "other/ca/ca.key", folder / "server/ca/ca.key")


def _nothing(folder: Path) -> None:
    pass


SIGN = "certs sign server/server.csr --ca server/ca"
REFUSED = {
    "a second authority": (
        "certs init --out server/ca",
        _nothing,
        r"server/ca/ca.key is there already, and .*; give another folder",
    ),
    "a second key": (
        "certs request a.org --out server",
        _nothing,
        r"server/server.key is there already, .* sign its request again",
    ),
    "an authority without a name": (
        "certs init --out new --name ",
        _nothing,
        r"'' has 0 characters; a name has 1 to 64 of them",
    ),
    "a name with a port": (
        "certs request a.org:9500 --out new",
        _nothing,
        r"'a.org:9500' is neither a host name nor an IP address of a server; .* without a port",
    ),
    "no address": (
        "certs request 10.0.0.256 --out new",
        _nothing,
        r"'10.0.0.256' is neither a host name nor an IP address",
    ),
    "an address at which a server listens": (
        "certs request 0.0.0.0 --out new",
        _nothing,
        r"'0.0.0.0' is neither a host name nor an IP address of a server",
    ),
    "a name that is too long": (
        f"certs request {'.'.join(['a' * 63] * 4)} --out new",
        _nothing,
        r"is neither a host name nor an IP address",
    ),
    "more days than the authority has": (
        f"{SIGN} --days 5000",
        _nothing,
        r"--days=5000 is longer than the authority lives, which expires in 36\d\d days; give fewer",
    ),
    "a request that was changed": (SIGN, _changed_request, r"is not signed with the key that it"),
    "a certificate as the request": (
        "certs sign server/server.crt --ca server/ca",
        _nothing,
        r"server/server.crt has no request that can be read",
    ),
    "no authority": (
        "certs sign server/server.csr --ca server",
        _nothing,
        r"^error: server/ca.key cannot be read: No such file or directory$",
    ),
    "a key of another authority": (SIGN, _key_of_another, r"ca.crt is not the certificate of"),
    "a key to show": (
        "certs show server/server.key",
        _nothing,
        r"server/server.key is a private key, and is not shown",
    ),
    "no PEM to show": ("certs show server/none", _nothing, r"server/none cannot be read: No such"),
}


def test_a_name_counts_once_in_whatever_letters(tmp_path):
    request = pem.read_request(make_request(["A.org", "a.org", "LOCALHOST"], tmp_path))
    assert pem.texts(pem.alternative_names(request)) == ["a.org", "localhost", "127.0.0.1"]


def test_of_two_authorities_at_once_one_has_the_folder(tmp_path):
    """The other would leave its certificate beside the key of the first one."""
    barrier = Barrier(8)

    def create(_: int) -> str:
        barrier.wait()
        try:
            Authority.create(tmp_path, name="both", days=1, now=NOW)
        except ConfigError as exc:
            return str(exc)
        return ""

    with ThreadPoolExecutor(8) as pool:
        refusals = list(pool.map(create, range(8)))
    assert refusals.count("") == 1 and all("is there already" in each for each in refusals if each)
    assert Authority.read(tmp_path).certificate


@pytest.mark.parametrize(("line", "damage", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_one_clear_line(line, damage, text, machines, capsys):
    certified(machines / "server")
    damage(machines)
    before = {f: f.read_bytes() for f in machines.rglob("*") if f.is_file()}
    assert main(line.split(" ")) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and told.err.count("\n") == 1
    assert re.search(text, told.err), told.err
    assert {f: f.read_bytes() for f in machines.rglob("*") if f.is_file()} == before
