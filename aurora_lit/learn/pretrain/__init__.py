"""A first draft from prompts and text. Answers prompts with the serving engine.

May import: learn/data/, serve/engine/. Start with stages.py. The files, each importing only those above it:

    label_text.py        stage one: the target reads text and labels every position
    generate_answers.py  stage two: the target answers prompts on our own engine
    trainer.py           the training loop, resumable
    stages.py            a first draft from prompts and text: the stages, in order
"""
