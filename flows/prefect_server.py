"""Whether the Prefect server that `PREFECT_API_URL` names can be used, found out before any work.

Prefect itself tries again for minutes, and then shows a traceback that names neither the setting nor the way out.
"""

import os
import re

from surgeon.errors import ServerError

API_VARIABLE = "PREFECT_API_URL"
_ANSWERS_WITHIN_S = 5.0
_WAY_OUT = (
    "start it (`prefect server start`), unset PREFECT_API_URL for a server of the run's own, or use --engine inline"
)


def has_server() -> bool:
    """Whether runs are recorded by a server that was there before them."""
    return bool(os.environ.get(API_VARIABLE))


def require_server() -> None:
    """Refuses a server that does not answer, is none, or is of another version; does nothing where none is named.

    Raises:
        ServerError: naming the setting, the address, what is wrong, and what to do.
    """
    if not has_server():
        return
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(sync_client=True, httpx_settings={"timeout": _ANSWERS_WITHIN_S}) as client,
        ):
            client.raise_for_api_version_mismatch()
    except Exception as error:
        # Whatever it is (address, network, certificate, another program on the port), Prefect could not go on with it.
        wrong = f"{API_VARIABLE}={os.environ[API_VARIABLE]}: {_reason(error)}"
        raise ServerError(f"{_without_passwords(wrong)}; {_WAY_OUT}") from error


def _reason(error: BaseException) -> str:
    if "incompatible versions" in str(error):
        return f"the Prefect server there is of another version ({str(error).rstrip('.')})"
    if "Unauthorized" in str(error):
        return "the Prefect server there wants a key or a password (PREFECT_API_KEY, PREFECT_API_AUTH_STRING)"
    while error.__cause__ is not None:
        error = error.__cause__
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return f"there is no Prefect server at this address ({said.rstrip('.')})"


def _without_passwords(text: str) -> str:
    """A text with addresses, as it may be shown."""
    return re.sub(r"//[^/\s]*@", "//", text)
