from bokeh.io import curdoc
from bokeh.models import Button, Div
from bokeh.layouts import column

out = Div(text='bokeh is here')
button = Button(label='press')
button.on_click(lambda: setattr(out, 'text', 'pressed'))
curdoc().add_root(column(out, button))
