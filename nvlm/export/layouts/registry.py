"""The layouts of exports by name."""

from __future__ import annotations

from nvlm.export.layouts import llava, llava_hf, nvlm, vila
from nvlm.export.layouts.form import Form

FORMS: dict[str, Form] = {module.FORM.layout.name: module.FORM for module in (nvlm, llava_hf, llava, vila)}
