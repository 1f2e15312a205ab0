"""What goes wrong with the Hugging Face hub, wherever it is asked."""

from __future__ import annotations

import httpx
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

# No such repository, no access to it, no connection, offline mode: all of them the user's to mend.
HUB_ERRORS = (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError)
