"""The examination: all checks of a subject, in their order."""

from collections.abc import Generator, Iterator

from fedsplit.doctor import certificates, data, machine, network, run, versions
from fedsplit.doctor.network import Answer
from fedsplit.doctor.result import Result, State, skipped
from fedsplit.doctor.subject import Machine, NodeConfig, Subject
from fedsplit.errors import ConfigError


def examine(subject: Subject, here: Machine) -> Iterator[Result]:
    """Yield the results of all checks, each as soon as it is there.

    Args:
        subject: What is checked.
        here: The machine.
    """
    needed = versions.packages_required()
    yield versions.check_python(here.python, versions.python_required())
    yield versions.check_packages(here.installed, needed)
    yield versions.check_tested(here.installed, needed, versions.versions_tested())
    starts = bool(subject.app or subject.bind)
    yield machine.check_installation(here.flower, here.environment, starts=starts)
    now = certificates.today(here.now())
    yield certificates.check_authority(subject.tls_ca, now)
    yield from certificates.check_own(subject.tls_cert, subject.tls_key, subject.tls_ca, now)
    yield network.check_bind(subject.bind)
    yield from _superlink(subject, here)
    answer = yield from _trunk(subject, here)
    yield from _part(subject, here, answer)
    yield from _node(subject.node_config)
    yield from run.check_app(subject.app)


def _superlink(subject: Subject, here: Machine) -> Iterator[Result]:
    if not subject.superlink:
        yield skipped("superlink", "no --superlink was given")
        return
    answer = None
    if (yield from _reached("superlink", subject.superlink, subject.tls_ca, here)):
        answer = network.ask_superlink(subject.superlink, subject.tls_ca, here.now)
    yield network.check_answer("superlink", answer)
    yield versions.check_flower(here.installed.get("flwr", ""), answer.version if answer else "")
    yield network.check_clock("superlink", answer.skew_s if answer else None)


def _trunk(subject: Subject, here: Machine) -> Generator[Result, None, Answer | None]:
    """Yield the results of a trunk's server; return its answer."""
    if not subject.trunk:
        yield skipped("trunk", "no --trunk was given")
        return None
    answer = None
    if (yield from _reached("trunk", subject.trunk, subject.tls_ca, here)):
        answer = network.ask_trunk(subject.trunk, subject.tls_ca, subject.token, here.now)
    yield network.check_answer("trunk", answer)
    info = answer.info if answer else None
    yield versions.check_peer("trunk", here.installed, info.versions if info else {})
    yield network.check_clock("trunk", answer.skew_s if answer else None)
    yield network.check_token(answer, subject.token, subject.token_error)
    yield certificates.check_secret("token file", subject.token_file)
    return answer


def _reached(name: str, address: str, tls_ca: str, here: Machine) -> Generator[Result, None, bool]:
    """Yield the results of a server's port and certificate; return whether they are good."""
    port = network.check_connection(name, address)
    yield port
    if port.state is not State.OK or not tls_ca:
        reason = "no --tls-ca was given" if port.state is State.OK else "its port is not reached"
        yield skipped(f"{name} certificate", reason)
        return port.state is State.OK
    try:
        found = certificates.presented(address, tls_ca)
    except ConfigError:
        yield skipped(f"{name} certificate", "the authority has to be right first")
        return False
    results = [
        certificates.check_chain(name, found),
        certificates.check_name(name, address, found),
        certificates.check_expiry(name, found, certificates.today(here.now())),
    ]
    yield from results
    return all(result.state is not State.FAIL for result in results)


def _part(subject: Subject, here: Machine, answer: Answer | None) -> Iterator[Result]:
    model = None
    if subject.model:
        model = run.read_model(
            subject.model, subject.revision, subject.split, trunk=bool(subject.bind)
        )
    yield run.check_model(subject.model, model)
    yield run.check_fingerprint(subject.trunk, subject.tls_ca, subject.token, model, answer)
    size = model.part_bytes if model else 0
    yield machine.check_device(subject.device)
    yield machine.check_memory(size, subject.device, here.free_memory)
    yield machine.check_state_dir(subject.state_dir)
    yield machine.check_disk(subject.state_dir, size, here.free_disk)


def _node(config: NodeConfig) -> Iterator[Result]:
    yield data.check_node_config(config)
    for key, check in data.PATH_CHECKS.items():
        yield check(str(config.get(key, "")))
