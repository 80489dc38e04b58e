"""The code-interpreter SDKs for Python, unmodified, against kernels in sandboxes of
a live server.

    python interpreter.py <novita|e2b> [part of a name...]

Prints "method <name>" for each method that the package adds, and for each test
"ok <name> [<methods>] <file> <ms>" or "not ok ..." with the error below it. Methods
have the names that they have in JavaScript.
"""
import asyncio
import json
import re
import sys
import time
import traceback

SDK = sys.argv[1]
ONLY = sys.argv[2:]
if SDK == "novita":
    from novita_sandbox.code_interpreter import AsyncSandbox, Sandbox
else:
    from e2b_code_interpreter import AsyncSandbox, Sandbox

scenarios = []


def scenario(f):
    scenarios.append(f)
    return f


def text(s, code, **opts):
    r = s.run_code(code, **opts)
    assert r.error is None, r.error.traceback
    return r.text


@scenario
def output_results_and_callbacks(s):
    out, err, results = [], [], []
    r = s.run_code(
        "import sys; print('to stdout'); print('to stderr', file=sys.stderr); 'ünï ☃ 🦊'",
        on_stdout=out.append, on_stderr=err.append, on_result=results.append,
    )
    assert (r.logs.stdout, r.logs.stderr, r.text) == (["to stdout\n"], ["to stderr\n"], "ünï ☃ 🦊"), r
    assert [m.line for m in out] == ["to stdout\n"] and [m.line for m in err] == ["to stderr\n"]
    assert abs(out[0].timestamp - time.time_ns()) < 60e9, out[0].timestamp
    assert [x.text for x in results] == ["ünï ☃ 🦊"]


@scenario
def an_exception_has_its_traceback(s):
    told = []
    r = s.run_code("def inner():\n    return 1 / 0\ninner()", on_error=told.append)
    assert (r.error.name, r.error.value) == ("ZeroDivisionError", "division by zero")
    assert "return 1 / 0" in r.error.traceback and told[0].name == r.error.name


@scenario
def a_figure_is_a_picture_and_a_chart(s):
    r = s.run_code("import matplotlib.pyplot as plt\nplt.bar(['a', 'b'], [1, 2], label='g')\nplt.ylabel('Length (m)')\nplt.show()")
    assert r.error is None, r.error.traceback
    chart = r.results[0].chart
    assert r.results[0].png and not r.results[0].extra
    assert type(chart).__name__ == "BarChart" and chart.y_unit == "m"
    assert [(b.label, b.group, b.value) for b in chart.elements] == [("a", "g", 1), ("b", "g", 2)]


@scenario
def a_frame_has_its_data(s):
    r = s.run_code("import pandas as pd; pd.DataFrame({'a': [1, 2, 3]})")
    assert r.error is None and r.results[0].data == {"a": [1, 2, 3]} and "<table" in r.results[0].html


@scenario
def the_usual_packages_are_there_without_a_network(_):
    # All of them fill half of a sandbox's memory; the other scenarios start more kernels.
    own = Sandbox.create(timeout=60)
    try:
        got = text(own, """
import bs4, openpyxl, pandas as pd, plotly.graph_objects as go, seaborn as sns
from sklearn.linear_model import LinearRegression
frame = pd.DataFrame({'a': [1, 2, 3], 'b': [2.0, 4.0, 6.0]})
frame.to_excel('/tmp/frame.xlsx', index=False)
slope = LinearRegression().fit(frame[['a']], frame['b']).coef_[0]
words = bs4.BeautifulSoup('<p>one<p>two', 'html.parser').get_text(' ')
page = go.Figure(go.Bar(x=frame['a'], y=frame['b'])).to_html(include_plotlyjs=False)
axes = sns.scatterplot(frame, x='a', y='b')
axes.figure.clear()
(pd.read_excel('/tmp/frame.xlsx').equals(pd.DataFrame({'a': [1, 2, 3], 'b': [2, 4, 6]})), round(slope, 6), words, 'Plotly.newPlot' in page)
""")
    finally:
        own.kill()
    assert got == "(True, 2.0, 'one two', True)", got


@scenario
def other_forms_of_a_result(s):
    r = s.run_code("class Own:\n    def _repr_mimebundle_(self, **_): return {'text/plain': 'own', 'application/x-own': 'more'}\nOwn()")
    assert r.results[0].extra == {"application/x-own": "more"}, r.results[0].extra


@scenario
def state_and_contexts(s):
    s.run_code("kept = 41")
    assert text(s, "kept += 1; kept") == "42"
    context = s.create_code_context(cwd="/tmp", language="python")
    assert s.run_code("kept", context=context).error.name == "NameError"
    assert text(s, "import os; os.getcwd()", context=context) == "/tmp"
    assert context.id in [c.id for c in s.list_code_contexts()]
    s.run_code("other = 1", context=context)
    s.restart_code_context(context)
    assert s.run_code("other", context=context).error.name == "NameError"
    s.remove_code_context(context)
    if hasattr(s, "delete_code_context"):
        other = s.create_code_context()
        s.delete_code_context(other)
        assert other.id not in [c.id for c in s.list_code_contexts()]
    assert context.id not in [c.id for c in s.list_code_contexts()]
    assert {"python", "javascript"} <= {c.language for c in s.list_code_contexts()}


@scenario
def variables_of_the_sandbox_and_of_a_cell(s):
    assert text(s, "import os; os.getenv('WHOSE')") == "the sandbox"
    assert text(s, "os.getenv('WHOSE')", envs={"WHOSE": "the cell"}) == "the cell"
    assert text(s, "os.getenv('WHOSE')") == "the sandbox"
    assert text(s, "process.env.WHOSE", language="javascript") == "the sandbox"
    assert s.run_code("echo $WHOSE", language="bash").logs.stdout == ["the sandbox\n"]


@scenario
def an_interrupted_loop_leaves_the_kernel(s):
    s.run_code("alive = 7")
    try:
        s.run_code("while True: pass", timeout=1)
        raise AssertionError("the loop ended")
    except AssertionError:
        raise
    except Exception as err:
        assert "timed out" in str(err).lower() or "timeout" in type(err).__name__.lower(), repr(err)
    began = time.monotonic()
    assert text(s, "alive") == "7"
    assert time.monotonic() - began < 10


@scenario
def other_languages(s):
    assert s.run_code("console.log('Hello')", language="js").logs.stdout == ["Hello\n"]
    assert text(s, "await Promise.resolve('Hello')", language="js") == "Hello"
    assert s.run_code("const m: string = 'Hello'; console.log(m)", language="ts").logs.stdout == ["Hello\n"]
    assert s.run_code("!pwd").logs.stdout[0].strip() == "/home/user"
    for language in ("r", "java"):
        try:
            s.run_code("1", language=language)
            raise AssertionError(language)
        except AssertionError:
            raise
        except Exception as err:
            assert "400" in str(err) or "not supported" in str(err), repr(err)


@scenario
def the_asynchronous_package(s):
    async def both():
        a = await AsyncSandbox.connect(s.sandbox_id)
        contexts = await asyncio.gather(a.create_code_context(), a.create_code_context())
        code = "import time; began = time.time(); time.sleep(2); [began, time.time()]"
        results = await asyncio.gather(*(a.run_code(code, context=c) for c in contexts))
        (a1, a2), (b1, b2) = (json.loads(r.text) for r in results)
        assert a1 < b2 and b1 < a2, "one context waited for the other"
        for c in contexts:
            await a.remove_code_context(c)

    asyncio.run(both())


def camel(name):
    return re.sub("_(.)", lambda m: m[1].upper(), name)


# What else than run_code a scenario shows.
ALSO = {state_and_contexts: "create_code_context list_code_contexts restart_code_context remove_code_context delete_code_context".split()}


def main():
    failed = 0
    for m in vars(Sandbox):
        if not m.startswith("_") and callable(getattr(Sandbox, m)) and "code" in m:
            print(f"method code.{camel(m)}")
    sandbox = Sandbox.create(timeout=300, envs={"WHOSE": "the sandbox"})
    try:
        for f in scenarios:
            name = f.__name__.replace("_", " ")
            if ONLY and not any(o in name for o in ONLY):
                continue
            name += f" [{' '.join('code.' + camel(m) for m in ALSO.get(f, ['run_code']))}] python/interpreter.py"
            began = time.monotonic()
            try:
                f(sandbox)
                print(f"ok {name} {(time.monotonic() - began) * 1000:.0f}", flush=True)
            except Exception:
                failed += 1
                print(f"not ok {name} {(time.monotonic() - began) * 1000:.0f}")
                print(re.sub("^", "    ", traceback.format_exc(), flags=re.M), flush=True)
    finally:
        sandbox.kill()
    sys.exit(1 if failed else 0)


main()
