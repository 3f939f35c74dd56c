"""How many tokens a round proposals without a draft give, on recorded answers; beside arctic-inference's suffix cache.

    python -m benchmarks.templated_prompts --out templated
    python -m benchmarks.memory_replay answers --prompts chat.jsonl templated/mails.jsonl --requests 220 --out answers
    python -m benchmarks.memory_replay prepare --work environments
    python -m benchmarks.memory_replay compare --answers answers --arctic environments/arctic/bin/python --reliability

Accepted tokens depend only on the answers and on what is proposed, so they are counted exactly, without a model and
without noise. Only the times of look-ups and updates depend on the machine.

replay.py         the interface of what proposes, and the loop that counts; imports nothing but the standard library
arctic.py         arctic-inference's suffix cache; runs in its own environment
proposers.py      what this project proposes
environment.py    makes arctic-inference's environment
answers.py        makes the answers
reliability.py    whether copies are accepted as often as they promise
report.py         tables
__main__.py       the commands
"""
