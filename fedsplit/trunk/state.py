"""The state of a trunk, read from its service and its engine."""

from fedsplit.telemetry.events import TrunkState
from fedsplit.trunk.service import TrunkService


def state_of(service: TrunkService) -> TrunkState:
    """Return the state of a trunk; any thread may ask."""
    engine = service.engine
    guard, clients = engine.guard_counts, engine.training.num_present
    return TrunkState(
        is_running=not engine.ended.done(),
        version=engine.version,
        sessions=service.num_sessions,
        clients=clients,
        waiting=engine.num_waiting,
        idle_s=engine.meter.idle_s if clients else 0.0,
        interval_s=engine.meter.interval_s,
        clipped=guard.clipped,
        refused=guard.refused,
        quarantines=guard.quarantines,
        stash=engine.training.stash_state,
        kv_cache=engine.cache_state,
    )
