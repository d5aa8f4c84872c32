"""JSON text as data, with one error for all that can be wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def parse(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON text says.

    Python's reader fails in four ways: text that is no JSON, bytes that are no text, nesting deeper
    than its stack, and whole numbers of more digits than it converts.

    Args:
        text: the text, or its bytes.
        pairs: makes the value of an object from its (name, value) pairs.

    Raises:
        json.JSONDecodeError: whichever it is; it is a `ValueError`.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("It is nested too deeply", "", 0) from None
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError(f"It is not UTF-8 ({error.reason})", "", 0) from error
    except ValueError as error:
        if type(error) is not ValueError:  # of `pairs`
            raise
        raise json.JSONDecodeError("A number has too many digits", "", 0) from error
