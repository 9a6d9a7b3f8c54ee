"""Fields of requests that would change the answer and are not obeyed: they are refused by name, never dropped."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import model_validator

from server.errors import InvalidRequest
from server.schema_parts import Body

NEUTRAL: tuple[Any, ...] = (None, False, [], {}, "")
"""Values by which a client asks for nothing."""
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": (), "best_of": (1,), "echo": (), "function_call": ("none", "auto"), "functions": (), "logprobs": (),
    "modalities": (["text"],), "moderation": (), "n": (1,), "parallel_tool_calls": (True,), "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},), "stream": (), "suffix": (), "tool_choice": ("none", "auto"), "tools": (),
    "top_logprobs": (0,), "verbosity": ("medium",), "web_search_options": (),
    # vLLM
    "add_special_tokens": (), "allowed_token_ids": (), "bad_words": (), "chat_template": (), "chat_template_kwargs": (),
    "documents": (), "guided_choice": (), "guided_grammar": (), "guided_json": (), "guided_regex": (), "include_reasoning": (True,),
    "include_stop_str_in_output": (), "kv_transfer_params": (), "length_penalty": (1,), "logits_processors": (),
    "media_io_kwargs": (), "mm_processor_kwargs": (), "prompt_embeds": (), "prompt_logprobs": (), "repetition_detection": (),
    "return_token_ids": (), "return_tokens_as_token_ids": (), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "structured_outputs": (), "thinking_token_budget": (), "truncate_prompt_tokens": (),
    "use_beam_search": (), "vllm_xargs": (),
    # SGLang
    "custom_logit_processor": (), "custom_params": (), "ebnf": (), "input_ids": (), "json_schema": (), "lora_path": (),
    "no_stop_trim": (), "regex": (), "return_hidden_states": (), "return_routed_experts": (), "separate_reasoning": (True,),
    "session_params": (), "stop_regex": (), "stream_reasoning": (True,),
}  # fmt: skip
"""Fields of other servers' requests that change the answer and are not obeyed where a body does not have them; each with the
values that ask for nothing, beside NEUTRAL. Fields that are in neither table change no answer and are ignored."""
MISPLACED = {
    "level": "pruning.level", "max_output_tokens": "max_completion_tokens", "text": "response_format",
    "instructions": "a system message", "input": "messages", "prompt": "messages", "question": "messages",
    "image": "image_url parts of messages", "images": "image_url parts of messages",
}  # fmt: skip
"""What fields of other bodies are called in a chat's."""


class Refusing(Body):
    """Bodies that refuse by name what would change the answer and is not obeyed."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = UNSUPPORTED
    misplaced: ClassVar[dict[str, str]] = MISPLACED
    """By name, what to send instead."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nothing(cls, values: Any) -> Any:
        foreign = (cls.misplaced.keys() | cls.refused.keys()) - cls.model_fields.keys()
        for name, value in values.items() if isinstance(values, dict) else ():
            if name not in foreign or _is_one_of(value, NEUTRAL):
                continue
            if name in cls.misplaced:
                raise InvalidRequest(f"{name}: is not known here; send {cls.misplaced[name]}", param=name)
            if not _is_one_of(value, cls.refused[name]):
                raise InvalidRequest(f"{name}: is not supported here; leave it out", param=name)
        return values


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    """By value and type: 0 is not False."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)
