"""Log lines for people or for machines. Neither ever holds a prompt, a picture, an answer or a key."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal

from server.caller import CALLER

LogFormat = Literal["text", "json"]


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """What a line says beside its message, as logging's `extra`; only machines see it."""
    return {"fields": values}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, who asked, and what `fields` gave."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "severity": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **CALLER.get().fields(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(log_format: LogFormat) -> None:
    """Log from INFO on to standard error."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
