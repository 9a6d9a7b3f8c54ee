"""For schemathesis: pictures, where the document of the API asks for some."""

from __future__ import annotations

import schemathesis
from hypothesis import strategies as st

from tests.server.fake_engine import data_url, picture

PICTURES = [picture(), picture("JPEG")]
schemathesis.openapi.format("data-url", st.sampled_from([data_url(one) for one in PICTURES]))
schemathesis.openapi.media_type("image/png", st.sampled_from(PICTURES))
