"""ChatML, for a base without a chat template of its own: tools in the Hermes manner."""

from __future__ import annotations

_TEMPLATE = """\
{%- set intro = messages[0].content if messages and messages[0].role == 'system' else '' %}
{%- if tools %}
    {{- '<|im_start|>system\\n' + (intro + '\\n\\n' if intro else '') }}
    {{- 'You may call these tools, one JSON object per line:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
    {{- '\\n</tools>\\nTo call one, answer with <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call>END\\n' }}
{%- elif intro %}
    {{- '<|im_start|>system\\n' + intro + 'END\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response>END\\n' }}
    {%- elif not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if message.content or not loop.first }}
            {{- '<tool_call>\\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- 'END\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
END, START = "<|im_end|>", "<|im_start|>"


def template(end: str) -> str:
    """The template whose turns end with the token `end`."""
    return _TEMPLATE.replace("END", end.replace("\\", "\\\\").replace("'", "\\'"))
