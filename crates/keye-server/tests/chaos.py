"""A minute of rough clients on a server that runs; ends with 1 when a kept stream does not finish, a 5xx comes, or anything is left.

keye serve -m MODEL --port 8124 --media-path DIRECTORY --max-streams 24 &
python chaos.py http://127.0.0.1:8124 DIRECTORY [SECONDS] [PID_OF_THE_SERVER] [TMPDIR_OF_THE_SERVER] [LOG_OF_THE_SERVER]

DIRECTORY has one.png, wide.png and clip.mp4. With the server's id its decoders are killed now and then, and counted at the end, as
are its temporary files; a failure in its log (`--log json`) that is not a killed decoder's is one of the test.
"""

import base64
import collections
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import requests

BASE, MEDIA = sys.argv[1:3]
SECONDS = float(sys.argv[3]) if len(sys.argv) > 3 else 60
PID = sys.argv[4] if len(sys.argv) > 4 else None
TEMPORARY = sys.argv[5] if len(sys.argv) > 5 else None
LOG = sys.argv[6] if len(sys.argv) > 6 else os.devnull
CHAT = f"{BASE}/v1/chat/completions"
URL = urllib.parse.urlparse(BASE)
CLIP = open(f"{MEDIA}/clip.mp4", "rb").read()
seen, wrong, start = collections.Counter(), [], time.time()
random.seed(1)


def decoders():
    """Processes that the server started."""
    found = subprocess.run(["pgrep", "-P", PID], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def data_url(data):
    return {"type": "video_url", "video_url": {"url": "data:video/mp4;base64," + base64.b64encode(data).decode()}}


def one():
    parts = random.choice([
        [],
        [{"type": "image", "image": "one.png"}],
        [{"type": "image", "image": "wide.png"}],
        [{"type": "video", "video": "clip.mp4", "fps": random.choice([1, 2, 3])}],
    ])
    text = {"type": "text", "text": "What? " + "x " * random.randint(0, 300)}
    body = {"messages": [{"role": "user", "content": [*parts, text]}], "max_tokens": random.randint(1, 300), "ignore_eos": True}
    kind = random.choice(["whole", "stream", "stream", "drop", "half", "bad", "corrupt", "choices", "response", "form", "vector"])
    answer = None
    if kind in ("whole", "choices"):
        answer = requests.post(CHAT, json={**body, "n": 3 if kind == "choices" else 1}, timeout=120)
    elif kind == "form":
        answer = requests.post(CHAT, json={**body, "max_tokens": 300, "regex": "[a-z]{3,9}"}, timeout=120)
    elif kind == "vector":
        answer = requests.post(f"{BASE}/v1/embeddings", json={"messages": body["messages"]}, timeout=120)
    elif kind == "response":
        answer = requests.post(f"{BASE}/v1/responses", json={"input": "Hm?", "max_output_tokens": 9}, timeout=120)
    elif kind == "stream":
        answer = requests.post(CHAT, json={**body, "stream": True}, timeout=120)
        # A decoder may have been killed under it: then it says so.
        if answer.status_code == 200 and not answer.text.rstrip().endswith("[DONE]") and '"error"' not in answer.text:
            wrong.append("a kept stream did not finish")
    elif kind == "drop":
        answer = requests.post(CHAT, json={**body, "stream": True, "max_tokens": 20000}, stream=True, timeout=120)
        most = random.randint(0, 40)
        if answer.status_code == 200:
            for count, _ in enumerate(answer.iter_lines()):
                if count > most:
                    break
            answer.close()
    elif kind == "half":
        with socket.create_connection((URL.hostname, URL.port)) as half:
            half.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"mess')
            time.sleep(random.random() / 10)
    elif kind == "bad":
        answer = requests.post(CHAT, data=random.randbytes(200), headers={"content-type": "application/json"})
    else:
        data = bytearray(CLIP)
        for _ in range(50):
            data[random.randrange(len(data))] = random.randrange(256)
        body["messages"][0]["content"] = [data_url(bytes(data)), text]
        answer = requests.post(CHAT, json=body, timeout=120)
    seen[kind, answer.status_code if answer is not None else 0] += 1
    # A decoder that was killed is the machine's failure; the log says of each failure that it was one.
    if answer is not None and answer.status_code >= 500 and not PID:
        wrong.append(f"{kind}: {answer.status_code} {answer.text[:200]}")


def client():
    while time.time() - start < SECONDS:
        try:
            one()
        except requests.RequestException as error:
            wrong.append(type(error).__name__)


def killer():
    while time.time() - start < SECONDS:
        time.sleep(0.5)
        for decoder in decoders()[:1]:
            try:
                os.kill(decoder, signal.SIGKILL)
                seen["killed", 0] += 1
            except ProcessLookupError:
                pass


def metric(text, name):
    return float(re.search(rf"^{name} (\S+)$", text, re.M).group(1))


threads = [threading.Thread(target=client) for _ in range(16)]
threads += [threading.Thread(target=killer)] if PID else []
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for _ in range(50):
    text = requests.get(f"{BASE}/metrics").text
    left = [metric(text, "keye_open_streams"), metric(text, "keye_kv_blocks") - metric(text, "keye_kv_blocks_free")]
    left += [len(decoders())] if PID else []
    left += [len(os.listdir(TEMPORARY))] if TEMPORARY else []
    if not any(left):
        break
    time.sleep(0.2)
with open(LOG) as log:
    failures = [line for line in log if '"level":"ERROR"' in line]
wrong += [line for line in failures if "ended by signal" not in line]
print("failures in the log:", len(failures))
for key, count in sorted(seen.items(), key=str):
    print(*key, count)
print("left of open streams, KV blocks, decoders, temporary files:", *left, "panics:", metric(text, "keye_panics_total"))
if any(left) or metric(text, "keye_panics_total"):
    wrong.append("something is left")
print(sum(seen.values()), "in all;", collections.Counter(wrong) if wrong else "nothing wrong")
sys.exit(bool(wrong))
