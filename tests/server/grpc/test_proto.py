from pathlib import Path

from nitsum_jax.server.proto import generate, nitsum_pb2


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    generate.generate(tmp_path)
    for path in generate.generated_paths():
        committed = (generate.PACKAGE_ROOT / path).read_text()
        assert (tmp_path / path).read_text() == committed, f"{path}: run python -m nitsum_jax.server.proto.generate"


def test_numbers_that_clients_in_the_field_rely_on() -> None:
    """Changing any of these breaks clients; new fields take new numbers."""
    numbers = {
        name: {field.name: field.number for field in message.fields}
        for name, message in nitsum_pb2.DESCRIPTOR.message_types_by_name.items()
    }
    assert numbers["GenerateRequest"] == {
        "text": 1,
        "chat": 2,
        "tokens": 3,
        "sampling": 4,
        "max_tokens": 5,
        "stop": 6,
        "stop_token_ids": 7,
        "ignore_eos": 8,
        "tier": 9,
        "return_prompt_ids": 10,
        "min_tokens": 11,
        "logprobs": 12,
        "form": 13,
        "include_stop": 14,
        "show_special_tokens": 15,
        "prompt_logprobs": 16,
        "split": 17,
        "ttft_ms": 20,
        "tpot_ms": 21,
    }
    assert numbers["OutputForm"] == {"json_schema": 1, "regex": 2, "choice": 3, "grammar": 4, "json_object": 5}
    assert numbers["ChatPrompt"] == {
        "messages": 1,
        "tools": 2,
        "tool_choice": 3,
        "single_tool_call": 4,
        "template_variables": 5,
        "continue_final_message": 6,
    }
    assert numbers["ChatMessage"] == {"role": 1, "content": 2, "tool_calls": 3, "tool_call_id": 4, "reasoning": 5}
    assert numbers["Tool"] == {"name": 1, "description": 2, "parameters": 3}
    assert numbers["ToolCall"] == {"id": 1, "name": 2, "arguments": 3}
    assert numbers["ToolCallDelta"] == {"index": 1, "name": 2, "arguments": 3}
    assert numbers["SamplingParams"] == {
        "temperature": 1,
        "top_k": 2,
        "top_p": 3,
        "min_p": 4,
        "repetition_penalty": 5,
        "presence_penalty": 6,
        "frequency_penalty": 7,
        "seed": 8,
        "logit_bias": 9,
    }
    assert numbers["GenerateResponse"] == {"started": 1, "delta": 2, "finished": 3}
    assert numbers["TokenDelta"] == {"text": 1, "token_ids": 2, "logprobs": 3, "reasoning": 4, "tool_calls": 5}
    assert numbers["TokenLogprob"] == {"token_id": 1, "logprob": 2, "top": 3}
    assert numbers["LikelyToken"] == {"token_id": 1, "logprob": 2}
    assert numbers["Finished"] == {
        "finish_reason": 1,
        "usage": 2,
        "ttft_ms": 3,
        "tpot_ms": 4,
        "stop": 5,
        "prompt_logprobs": 6,
    }
    assert numbers["EmbedRequest"] == {"inputs": 1, "tier": 2, "ttft_ms": 3}
    assert numbers["EmbedInput"] == {"text": 1, "tokens": 2}
    assert numbers["EmbedResponse"] == {"embeddings": 1, "usage": 2}
    assert numbers["Embedding"] == {"values": 1}
    assert numbers["SetLayoutRequest"] == {"layout": 1, "prepare": 2}
