"""Chat templates in Jinja that write a conversation as `data/conversation.py` does for training.

The tokenizer adds the first token of a sequence, not the template. Training encodes each earlier answer of a
conversation by itself, and transformers encodes it together with the text around it; the text is the same.
"""

from __future__ import annotations

import json

from megatron_evomoe.data.conversation import TEMPLATES

# The text of a message: its parts in order, without outer whitespace. A single image at either end moves to
# the front, on a line of its own.
_TEXT_OF = """\
{%- macro text_of(message) -%}
  {%- set parts = namespace(text='') -%}
  {%- if message['content'] is string -%}
    {%- set parts.text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- set parts.text = parts.text + ('<image>' if part['type'] == 'image' else part['text']) -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set text = parts.text.strip() -%}
  {%- if message['role'] == 'user' and text.count('<image>') == 1
         and (text.startswith('<image>') or text.endswith('<image>')) -%}
    {%- set text = ('<image>\\n' + text.replace('<image>', '').strip()).strip() -%}
  {%- endif -%}
  {{- text -}}
{%- endmacro -%}
"""
# `system` is the text of a system message or the default; the other messages must alternate.
_TURNS = """\
{%- set system = SYSTEM -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = text_of(messages[0]) -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- if turns and turns[0]['role'] == 'assistant' -%}
  {%- set turns = turns[1:] -%}
{%- endif -%}
{%- for message in turns -%}
  {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('user and assistant must alternate, after at most one system message') -}}
  {%- endif -%}
{%- endfor -%}
"""
_ROLES = """\
{{- PREFIX -}}
{%- if system -%}{{- system + ' ' -}}{%- endif -%}
{%- for message in turns -%}
  {%- if message['role'] == 'assistant' -%}
    {{- ' ' + text_of(message) + END -}}
  {%- else -%}
    {{- 'USER: ' + text_of(message) -}}
    {%- if add_generation_prompt or not loop.last -%}{{- ' ASSISTANT:' -}}{%- endif -%}
  {%- endif -%}
{%- endfor -%}
"""
_CHATML = """\
{%- if system -%}{{- '<|im_start|>system\\n' + system + '<|im_end|>' -}}{%- endif -%}
{%- for message in turns -%}
  {%- if message['role'] == 'assistant' -%}
    {{- text_of(message) + END -}}
  {%- else -%}
    {%- if system or not loop.first -%}{{- '\\n' -}}{%- endif -%}
    {{- '<|im_start|>user\\n' + text_of(message) + '<|im_end|>' -}}
    {%- if add_generation_prompt or not loop.last -%}{{- '\\n<|im_start|>assistant\\n' -}}{%- endif -%}
  {%- endif -%}
{%- endfor -%}
"""
_PLAIN = """\
{%- for message in turns -%}
  {%- if message['role'] == 'assistant' -%}
    {{- text_of(message) + '\\n' + END -}}
  {%- else -%}
    {{- '<image>' * text_of(message).count('<image>') -}}
  {%- endif -%}
{%- endfor -%}
"""
_STYLES = {"roles": _ROLES, "chatml": _CHATML, "plain": _PLAIN}


def chat_template(template: str, end: str, prefix: str = "") -> str:
    """The Jinja source of a conversation template.

    Args:
        template: a name in `data.conversation.TEMPLATES`.
        end: text of the token that ends a turn.
        prefix: text before the first word, if the tokenizer does not add it.
    """
    known = TEMPLATES[template]
    source = _TEXT_OF + _TURNS + _STYLES[known.style]
    for name, value in (("SYSTEM", known.system), ("END", end), ("PREFIX", prefix)):
        source = source.replace(name, json.dumps(value, ensure_ascii=False))
    return source
