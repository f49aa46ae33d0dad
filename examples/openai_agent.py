"""An agent that knows nothing of pz: the openai client, lines of JSON in, lines of JSON out.

Play with it:
    pz-bench run -a "external:python examples/openai_agent.py" -e pz/Countdown-v0 --model tiny
"""

import json
import os
import re
import sys

from openai import OpenAI

client = OpenAI()  # OPENAI_BASE_URL and OPENAI_API_KEY
messages = []

for line in sys.stdin:
    turn = json.loads(line)
    if turn["done"]:
        break
    text = turn["observation"]
    if not messages and turn["info"].get("instruction"):
        text = f"{turn['info']['instruction']}\n\n{text}"
    messages.append({"role": "user", "content": text})
    answer = client.chat.completions.create(
        model=os.environ["OPENAI_MODEL"], messages=messages[-9:], max_tokens=48
    )
    reply = answer.choices[0].message.content
    messages.append({"role": "assistant", "content": reply})
    found = re.search(r"<(action|answer)>(.*?)</\1>", reply, re.DOTALL)
    print(json.dumps({"action": found.group(0) if found else reply}), flush=True)
