"""Checks of the servers' ports as seen from this machine, of their answers and their clocks."""

import errno
import http.client
import json
import socket
import ssl
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from fedsplit.doctor.result import Result, fail, ok, skipped, warn
from fedsplit.errors import ConfigError, FedsplitError, peer_text
from fedsplit.spec import WireSpec
from fedsplit.transport.address import check_port
from fedsplit.transport.client import GrpcLink
from fedsplit.wire.messages import ServiceInfoReply, ServiceInfoRequest

TIMEOUT_S = 5.0
"""Seconds that a server has to accept a connection, and to answer."""

# A SuperLink that authenticates SuperNodes refuses a message from more than 5 s ahead.
_SKEW_S, _MAX_SKEW_S = 5.0, 60.0
_ANSWER_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server said.

    Attributes:
        error: Why it did not answer; empty if it did.
        skew_s: Seconds by which its clock is ahead of this machine's; None if it does not tell.
        version: The SuperLink's version of Flower.
        info: A trunk's description.
    """

    error: str = ""
    skew_s: float | None = None
    version: str = ""
    info: ServiceInfoReply | None = None


def host_and_port(address: str) -> tuple[str, int]:
    """Return the two parts of an address.

    >>> host_and_port("[::1]:9500")
    ('::1', 9500)

    Raises:
        ConfigError: It is not host:port.
    """
    host, _, port = address.rpartition(":")
    check_port("the address ", address)
    if not (host and port.isdecimal()):
        raise ConfigError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)


def check_connection(name: str, address: str) -> Result:
    """Check that a server's port accepts connections from this machine."""
    name = f"{name} port"
    try:
        with connected(address):
            return ok(name, f"{address} accepts connections")
    except ConfigError as exc:
        return fail(name, str(exc), "give the address as host:port")
    except socket.gaierror:
        return fail(
            name,
            f"{address}: this machine finds no address of that host",
            "correct the name, or enter it in the DNS or in /etc/hosts of this machine",
        )
    except TimeoutError:
        return fail(
            name,
            f"{address} did not answer within {TIMEOUT_S:g} s",
            "open the port in the firewalls between the machines, and check the address",
        )
    except OSError as exc:
        return fail(
            name,
            f"{address}: {exc.strerror or exc}",
            "start the server, have it listen on an address that this machine reaches (0.0.0.0 "
            "for all), and check the address and the port",
        )


def connected(address: str) -> socket.socket:
    """Return a connection to host:port or unix:path.

    Raises:
        ConfigError: The address has another form.
        OSError: There is no connection.
    """
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address.removeprefix("unix:"))
        except OSError:
            connection.close()
            raise
        return connection
    return socket.create_connection(host_and_port(address), timeout=TIMEOUT_S)


def check_bind(bind: str) -> Result:
    """Check that this machine can listen at an address."""
    if not bind:
        return skipped("listening port", "no --bind was given")
    if bind.startswith("unix:"):
        return skipped("listening port", "a socket in the file system has no port")
    try:
        host, port = host_and_port(bind)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.listen()
    except ConfigError as exc:
        return fail("listening port", str(exc), "give --bind as host:port")
    except OSError as exc:
        found = f"{bind} cannot be listened on: {exc.strerror or exc}"
        if exc.errno == errno.EADDRINUSE:
            return warn(
                "listening port", found, "if it is not this server that runs already, end the other"
            )
        return fail("listening port", found, "give an address of this machine, or 0.0.0.0")
    return ok("listening port", f"{bind} is free")


def ask_superlink(address: str, tls_ca: str, now: Callable[[], float]) -> Answer:
    """Ask a SuperLink for the description of its API, which has Flower's version."""
    try:
        host, port = host_and_port(address)
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        if tls_ca:
            trust = ssl.create_default_context(cafile=tls_ca)
            connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=trust)
        with closing(connection):
            before = now()
            connection.request("GET", "/openapi.json")
            reply = connection.getresponse()
            middle = (before + now()) / 2
            told = json.loads(reply.read(_ANSWER_BYTES))["info"]
        if not str(told["title"]).startswith("SuperLink"):
            return Answer(error=f"it is {peer_text(str(told['title']))}")
        date = parsedate_to_datetime(reply.headers["Date"]).timestamp()
        return Answer(version=peer_text(str(told["version"])), skew_s=date - middle)
    except (OSError, http.client.HTTPException, ConfigError) as exc:
        return Answer(error=peer_text(str(exc)) or type(exc).__name__)
    except (ValueError, KeyError, TypeError) as exc:
        return Answer(error=f"it answers otherwise than a SuperLink ({type(exc).__name__})")


def ask_trunk(address: str, tls_ca: str, token: str, now: Callable[[], float]) -> Answer:
    """Ask a trunk's server for its description."""
    wire = WireSpec(tls_ca=tls_ca, call_deadline_s=TIMEOUT_S)
    try:
        with closing(GrpcLink(address, token=token, wire=wire)) as link:
            before = now()
            info = link.exchange(ServiceInfoRequest())
            middle = (before + now()) / 2
    except FedsplitError as exc:
        return Answer(error=str(exc))
    return Answer(info=info, skew_s=info.time_s - middle if info.time_s else None)


def check_answer(name: str, answer: Answer | None) -> Result:
    """Check that a server answers as it should."""
    check = f"{name} answer"
    if answer is None:
        return skipped(check, "its port is not reached, or its certificate is wrong")
    if answer.error:
        return fail(
            check,
            answer.error,
            f"check that a {name} runs at this address and has TLS if and only if --tls-ca was "
            "given",
        )
    described = f"Flower {answer.version}" if answer.version else "it"
    if answer.info:
        described = f"{answer.info.family}, cut {answer.info.blocks}"
    return ok(check, f"{described} answers")


def check_clock(name: str, skew_s: float | None) -> Result:
    """Check that a server's clock agrees with this machine's."""
    name = f"{name} clock"
    if skew_s is None:
        return skipped(name, "the server did not tell its time")
    found = f"the server's clock is {abs(skew_s):.0f} s {'ahead' if skew_s > 0 else 'behind'}"
    do = (
        "set both clocks by NTP (timedatectl set-ntp true); certificates and Flower's "
        "authentication of SuperNodes depend on them"
    )
    if abs(skew_s) > _MAX_SKEW_S:
        return fail(name, found, do)
    return warn(name, found, do) if abs(skew_s) > _SKEW_S else ok(name, found)


def check_token(answer: Answer | None, token: str, error: str) -> Result:
    """Check that the trunk's server accepts the token."""
    if error:
        return fail("token", error, "copy the server's token file to this machine")
    if answer is None or answer.info is None:
        return skipped("token", "no trunk answered")
    # A server tells what is in use only to callers that it admits.
    if answer.info.budgets:
        return ok("token", "the trunk accepts it" if token else "the trunk needs none")
    if token:
        return fail(
            "token",
            "the trunk does not accept it",
            "copy the file that the server was started with (--token-file) to this machine",
        )
    return warn(
        "token",
        "the trunk needs one, and none was given",
        "give --token-file; in a run under Flower, clients get their tokens from the server",
    )
