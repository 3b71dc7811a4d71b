"""Small chat templates, each with what a published family of templates does, and talks to render with them.

All are written for these tests; the names say whose habits they have. `make_chat_templates.py` writes what transformers
makes of them.
"""

from typing import Any

PLAIN = [{"role": "user", "content": "  Hi <there> & 'you' é\n"}]
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\nFour."},
    {"role": "user", "content": "Thanks"},
]
TWICE = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
TALKS: dict[str, list[dict[str, Any]]] = {"plain": PLAIN, "talk": TALK, "twice": TWICE}

PARTS_TALK = [
    {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
    {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "2 + 2?"}]},
]
"""What a client sends that writes parts."""

# Templates that say nothing, or fail, when they are given text.
READ_PARTS = {"llava", "smolvlm", "idefics", "pixtral_strict", "parts_indexed"}
# Templates that take both.
READ_EITHER = {"gemma_3", "qwen2_vl", "llama_3_2_vision"}

TEMPLATES: dict[str, str] = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
        " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama_2": """\
{% if messages[0]['role'] == 'system' %}
  {% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}
  {% set rest = messages %}{% set system = false %}
{% endif %}
{% for m in rest %}
  {% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
  {% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] if loop.first and system else m['content'] %}
  {% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
  {% elif m['role'] == 'assistant' %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}
""",
    "mistral_v3_tools": """\
{%- set user = messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for m in messages %}
    {%- if m["role"] == "user" %}
        {%- if tools is not none and (m == user[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + m["content"] + "[/INST]" }}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}
        {{- "[TOOL_CALLS]" }}
    {%- elif m["role"] == "assistant" %}
        {{- " " + m["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "mistral_nemo_namespace": """\
{%- set ns = namespace(index=0) %}
{%- for m in messages if m.role != "system" %}
    {%- if (m["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {{- "[INST]" + m["content"] + "[/INST]" if m.role == "user" else m["content"] + eos_token }}
{%- endfor %}
""",
    "llama_3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' +"
        " message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 =="
        " 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt"
        " %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "llama_3_1_tools": """\
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("today") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if builtin_tools is defined or tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}{{- tools | tojson(indent=4) }}{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- message['role'] + '\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant\\n\\n' }}{%- endif %}
""",
    "llama_3_2_vision": """\
{%- for message in messages %}
    {{- message['role'] + ': ' }}
    {%- if message['content'] is string %}{{- message['content'] }}
    {%- else %}
        {%- for content in message['content'] %}
            {%- if content['type'] == 'image' %}{{- '<|image|>' }}
            {%- elif content['type'] == 'text' %}{{- content['text'] }}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
""",
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content']"
        " | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}"
        "{% endif %}"
    ),
    "gemma_3": """\
{{ bos_token }}
{%- for message in messages -%}
    {{ '<start_of_turn>' + message['role'] + '\n' }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
""",
    "phi_3": (
        "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
        "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
        "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "qwen2_5_tools": """\
{%- if tools %}
    {{- '<tools>' }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- '</tools>' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}{{- 'You are helpful.<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or
           (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
""",
    "qwen2_vl": (
        "{% set image_count = namespace(value=0) %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}{% set image_count.value = image_count.value + 1 %}<|image_pad|>"
        "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    ),
    "qwen3_thinking": """\
{%- set ns = namespace(multi_step=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string and
           not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}{%- set reasoning = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set reasoning = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- ('[' + reasoning + ']' if loop.index0 > ns.last else '') + content }}
    {%- else %}
        {{- message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
""",
    "deepseek_r1": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        "{% set ns = namespace(is_first=false, system_prompt='') %}{%- for message in messages %}"
        "{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
        "{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}"
        "{{'<|User|>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content']"
        " is not none %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content ="
        " content.split('</think>')[-1] %}{% endif %}{{'<|Assistant|>' + content + '<|end_of_sentence|>'}}"
        "{%- endif %}{%- endfor -%}{% if add_generation_prompt %}{{'<|Assistant|><think>\\n'}}{% endif %}"
    ),
    "command_r_documents": """\
{{ bos_token }}
{%- if documents is not none %}
{{ '<results>' }}
{%- for document in documents %}
{{ loop.index0 }}{% for key, value in document.items() %}{{ key ~ ': ' ~ value }}{% endfor %}
{%- endfor %}
{{ '</results>' }}
{%- endif %}
{%- for message in messages %}
{{- '<|START|>' ~ (message['role'] | upper) ~ '_TOKEN' ~ (message['content'] | string).strip() ~ '<|END|>' }}
{%- endfor %}
""",
    "granite": """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}{%- set rest = messages[1:] %}
{%- else %}
    {%- set system_message = "Date: " + strftime_now('month, year') + "." %}{%- set rest = messages %}
    {%- if tools and documents %}{%- set system_message = system_message + " Both." %}
    {%- elif tools %}{%- set system_message = system_message + " Tools." %}
    {%- elif thinking %}{%- set system_message = system_message + " Think." %}{%- endif %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\n' }}
{%- for message in rest %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}
    {%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}
{%- endfor %}
""",
    "zephyr": """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
""",
    "vicuna": (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set rest = messages[1:] %}{% else %}"
        "A chat.{% set rest = messages %}{% endif %}{% for m in rest %}{{ ' ' }}{{ {'user': 'USER', 'assistant':"
        " 'ASSISTANT'}[m.role] }}: {{ m['content'].strip() }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    ),
    "alpaca": """\
{{ bos_token }}{% for message in messages %}
    {%- if message.role == "user" %}
### Instruction:
{{ message.content }}

    {%- elif message.role == "assistant" %}
### Response:
{{ message.content }}{{ eos_token }}

    {%- endif %}
{% endfor %}
### Response:
""",
    "openchat": (
        "{{ bos_token }}{% for message in messages %}{{ 'GPT4 Correct ' + message['role'].title() + ': ' +"
        " message['content'] + '<|end_of_turn|>'}}{% endfor %}{% if add_generation_prompt %}"
        "{{ 'GPT4 Correct Assistant:' }}{% endif %}"
    ),
    "smollm3_generation": """\
{%- for message in messages -%}
    {%- set seen = loop.index -%}
    {%- if message.role == "assistant" -%}
        {% generation %}{% set seen = "inside" %}{{ seen ~ message.content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- endgeneration %}
    {%- else -%}
        {{ "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
    {%- endif -%}
    {{ seen }}
{%- endfor -%}
""",
    "glm_4": (
        "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>\n{% for tool in"
        " item['tools'] %}{{ tool | tojson(indent=4) }}{% endfor %}{% endif %}{% if item['content'] %}"
        "<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "exaone_loop_neighbours": (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\n'"
        " }}{% endif %}{{ '[|' + message['role'] + '|]' + message['content'] }}{% if loop.nextitem is defined %}"
        "{{ '(' + loop.nextitem.role + ')' }}{% endif %}{% if loop.changed(message.role) %}{{ '*' }}{% endif %}"
        "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    ),
    "hermes_json": """\
{%- macro type_of(value) %}{{- {"str": "string", "int": "integer"}[value] if value in ["str", "int"] else "any" }}
{%- endmacro %}
{{- messages | tojson }}
{{- {"b": [1, 2.5, none, true], "a": "<é&'>"} | tojson(sort_keys=true) }}
{{- {"b": 1, "a": "é"} | tojson(indent=2, ensure_ascii=true) }}
{{- [1, {"x": 2}] | tojson(separators=(",", ":")) }}
{{- type_of("str") ~ type_of("list") }}
{{- tools | tojson }}
""",
    "gpt_oss_macros": """\
{%- macro typed(name, value, required=false) -%}
{{ name }}{{ "" if required else "?" }}: {{ value if value is number else value | string | length }}
{%- endmacro -%}
{%- if model_identity is not defined %}{%- set model_identity = "An assistant." %}{%- endif -%}
{{ "<|start|>system<|message|>" + model_identity + "\n" + "Current date: " + strftime_now("day") }}
{%- if tools -%}{{ "tools" }}{%- endif -%}
{%- for message in messages -%}
{{ "<|start|>" ~ typed(message.role, loop.index) ~ typed("x", message.content, required=true) ~ "<|end|>" }}
{%- endfor -%}
""",
    "functionary_controls": """\
{%- for message in messages %}
    {%- if message.role == "system" %}{%- continue %}{%- endif %}
    {%- if loop.index > 3 %}{%- break %}{%- endif %}
    {{- loop.index ~ message.role }}
{%- endfor %}
""",
    "nemotron_filters": """\
{%- set users = messages | selectattr('role', 'eq', 'user') | map(attribute='content') | list %}
{{- users | join(' | ') }}{{ users | first | replace('e', 'E') }}{{ users[-1] | upper }}
{{- messages | groupby('role') | map(attribute='grouper') | join(',') }}
{%- for key, value in messages[0] | dictsort %}{{ key }}={{ value | trim | length }};{%- endfor %}
{{- messages | map(attribute='role') | unique | join('/') }}{{ (messages | length) // 2 }}{{ '%s-%d' | format('a', 3) }}
""",
    "strict_whitespace": (
        "  {% if true %}\n    a\n  {% endif %}\n\t{# a remark #}\nb {%+ if true %} c {% endif +%}\n\nd\n\n"
    ),
    "bos_and_eos_only": "{{ bos_token }}{{ messages[-1].content }}{{ eos_token }}{{ unknown_variable }}",
    "refuses_all": "{{ raise_exception('not for ' + messages[0].role + 's') }}",
    "fails_on_none": "{{ 'x' + tools }}",
    "defined_and_none": (
        "{{ tools is defined }}{{ tools is none }}{{ tools == none }}{{ documents is defined }}{{ documents is none }}"
        "{{ nothing is defined }}{{ nothing is none }}{{ tools | default('d') }}{{ nothing | default('d') }}"
    ),
    "llava": (
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for content in message['content'] |"
        " selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}{% for content in message['content'] |"
        " selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    ),
    "smolvlm": (
        "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}{% if message['content'][0]['type']"
        " == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}{% for line in message['content'] %}{% if line['type']"
        " == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
        "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "idefics": (
        "{% for message in messages %}{{ message.role }}:{% for part in message.content %}{{ part.text if part.type =="
        " 'text' else '<image>' }}{% endfor %}<end>{% endfor %}"
    ),
    "pixtral_strict": (
        "{% for message in messages %}{% if message.content is string %}{{ raise_exception('parts only') }}{% endif %}"
        "[{% for part in message.content %}{{ part['text'] }}{% endfor %}]{% endfor %}"
    ),
    "parts_indexed": (
        "{% for m in messages %}{{ (m.content | selectattr('type', 'eq', 'text') | first).text }};{% endfor %}"
    ),
}
