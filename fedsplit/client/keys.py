"""Secret keys of clients: 32 random bytes in files that only their owner can read."""

import secrets
from pathlib import Path

from fedsplit import atomic
from fedsplit.errors import ConfigError

KEY_BYTES = 32


def new_key() -> bytes:
    """Return random bytes of the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def require_key(key: bytes, what: str) -> bytes:
    """Return a key that has the right size.

    Raises:
        ConfigError: It has another one.
    """
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{what} has {KEY_BYTES} bytes, but this one {len(key)}")
    return key


def kept_key(file: Path) -> bytes:
    """Return the bytes of a key file, which is made at the first time.

    Raises:
        StorageError: The file cannot be written.
        ConfigError: It cannot be read.
    """
    if not file.exists():
        atomic.create_secret(file, new_key())
    return read_key(file)


def read_key(file: Path) -> bytes:
    """Return the bytes of a key file.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as exc:
        raise ConfigError(
            f"the key file {file} cannot be read ({exc.strerror}); make it once, as with "
            f"head -c {KEY_BYTES} /dev/urandom, and copy it to all that need it"
        ) from exc
