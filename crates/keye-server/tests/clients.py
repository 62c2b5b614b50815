"""Checks a server with the clients that people use: `requests` as in the vendor's README, and OpenAI's own.

python clients.py BASE_URL DIRECTORY_OF_MEDIA
"""

import base64
import json
import sys
from typing import Annotated, Literal

import openai
import pydantic
import requests

BASE, MEDIA = sys.argv[1:3]


def data_url(kind, name):
    with open(f"{MEDIA}/{name}", "rb") as file:
        return f"data:{kind};base64,{base64.b64encode(file.read()).decode()}"


def vendor(kind, url, **more):
    payload = {
        "model": "",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": kind, kind: {"url": url}},
                    {"type": "text", "text": "Describe it."},
                ],
            }
        ],
        "n": 1,
        "temperature": 0.6,
        "max_tokens": 16,
        **more,
    }
    answer = requests.post(f"{BASE}/v1/chat/completions", json=payload, timeout=60)
    assert answer.status_code == 200, answer.text
    assert isinstance(answer.json()["choices"][0]["message"]["content"], str)
    return answer.json()


image, video = data_url("image/png", "one.png"), data_url("video/mp4", "clip.mp4")
vendor("image_url", image, top_k=1)
vendor("image_url", image, top_p=0.8, ignore_eos=False, skip_special_tokens=True)
few = vendor("video_url", video, top_k=1, preprocess_kwargs={"fps": 1})
vendor("video_url", video, top_p=0.8)
assert few["usage"]["prompt_tokens"] > 0

client = openai.OpenAI(base_url=f"{BASE}/v1", api_key="none", max_retries=0)
model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model
content = [{"type": "image_url", "image_url": {"url": image, "detail": "high"}}, {"type": "text", "text": "What is it?"}]
ask = dict(model=model, messages=[{"role": "user", "content": content}], max_completion_tokens=20, seed=5)
whole = client.chat.completions.create(**ask)
assert whole.choices[0].finish_reason in ("stop", "length")
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

text, usage = "", None
for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
    usage = chunk.usage or usage
    if chunk.choices:
        text += chunk.choices[0].delta.content or ""
assert text == whole.choices[0].message.content
assert usage.completion_tokens == whole.usage.completion_tokens

extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "chat_template_kwargs": {"enable_thinking": False}}
client.chat.completions.create(**ask, n=2, stop=["x"], extra_body=extra)
assert client.completions.create(model="", prompt="Once", max_tokens=5).choices[0].text is not None

tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
called = {"role": "assistant", "tool_calls": [
    {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]}
turns = [{"role": "user", "content": "Look."}, called, {"role": "tool", "tool_call_id": "1", "content": "A cat."}]
answer = client.chat.completions.create(model="", messages=turns, tools=[tool], max_completion_tokens=5)
assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")

# Calls that are demanded, forms of answers, how likely tokens were, vectors.
cool = dict(model="", temperature=1.2, seed=3, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
tool["function"]["parameters"] = {"type": "object", "required": ["side"], "additionalProperties": False,
                                  "properties": {"side": {"enum": ["left", "right"]}}}
for choice in ["required", {"type": "function", "function": {"name": "look"}}]:
    asked = dict(cool, messages=turns[:1], tools=[tool], tool_choice=choice, parallel_tool_calls=False)
    answer = client.chat.completions.create(**asked).choices[0]
    call = answer.message.tool_calls[0]
    assert answer.finish_reason == "tool_calls" and call.function.name == "look"
    assert json.loads(call.function.arguments)["side"] in ("left", "right")
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert final.function.arguments == call.function.arguments


class Finding(pydantic.BaseModel):
    model_config = {"extra": "forbid"}
    kind: Literal["clip", "photo"]
    scores: Annotated[list[Annotated[int, pydantic.Field(ge=0, le=9)]], pydantic.Field(min_length=1, max_length=3)]


found = client.chat.completions.parse(**cool, messages=turns[:1], response_format=Finding, max_completion_tokens=200)
assert isinstance(found.choices[0].message.parsed, Finding), found
found = client.responses.parse(model="", input="Look.", text_format=Finding, reasoning={"effort": "none"}, temperature=1.2)
assert isinstance(found.output_parsed, Finding), found
answer = client.chat.completions.create(**cool, messages=turns[:1], logprobs=True, top_logprobs=2, max_completion_tokens=4)
tokens = answer.choices[0].logprobs.content
assert len(tokens) == answer.usage.completion_tokens and len(tokens[0].top_logprobs) == 2, tokens
assert all(token.logprob <= 0 and token.token == bytes(token.bytes).decode(errors="replace") for token in tokens), tokens
answer = client.completions.create(model="", prompt="Once", max_tokens=5, logprobs=2)
assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.token_logprobs) == 5, answer
vectors = [client.embeddings.create(model="", input=["A cat.", "Rain."], encoding_format=form).data
           for form in (openai.omit, "float")]
for packed, plain in zip(*vectors, strict=True):
    assert abs(sum(x * x for x in plain.embedding) - 1) < 1e-4
    assert all(abs(a - b) < 1e-6 for a, b in zip(packed.embedding, plain.embedding, strict=True))

# The newer API: the same answer, whole and streamed.
parts = [{"type": "input_image", "image_url": image, "detail": "high"}, {"type": "input_text", "text": "What is it?"}]
asked = dict(model=model, input=[{"role": "user", "content": parts}], max_output_tokens=20, extra_body={"seed": 5})
response = client.responses.create(**asked)
assert response.output_text == whole.choices[0].message.content, response
assert response.status in ("completed", "incomplete")
assert response.usage.total_tokens == whole.usage.total_tokens
text, kinds, last = "", [], None
for event in client.responses.create(**asked, stream=True):
    kinds.append(event.type)
    last = event
    if event.type == "response.output_text.delta":
        text += event.delta
assert text == response.output_text and kinds[:2] == ["response.created", "response.in_progress"], kinds
assert last.response.output_text == text and last.response.status == response.status
with client.responses.stream(model="", input="Hello", instructions="Be brief.", max_output_tokens=6) as stream:
    last = list(stream)[-1]
assert last.type in ("response.completed", "response.incomplete") and last.response.usage.output_tokens > 0, last
video = {"type": "input_video", "video_url": data_url("video/mp4", "clip.mp4"), "fps": 1}
asked["input"][0]["content"] = [video, parts[1]]
assert client.responses.create(**asked).usage.input_tokens > 20
try:
    client.responses.create(model="", input="x", previous_response_id="resp_1")
except openai.BadRequestError as found:
    assert found.body["param"] == "previous_response_id", found.body
else:
    raise AssertionError("a stored response")

for change, error in [
    ({"temperature": -1}, openai.BadRequestError),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/no"}}}},
     openai.BadRequestError),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]},
     openai.BadRequestError),
]:
    try:
        client.chat.completions.create(**{**ask, **change})
    except error as found:
        assert found.body["message"] and found.body["type"] == "invalid_request_error", found.body
    else:
        raise AssertionError(change)
print("clients.py: all passed with openai", openai.__version__)
