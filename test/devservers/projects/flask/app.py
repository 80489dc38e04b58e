import os

from flask import Flask, redirect, url_for

app = Flask(__name__)
if os.environ.get('PROXYFIX'):
    from werkzeug.middleware.proxy_fix import ProxyFix
    app.wsgi_app = ProxyFix(app.wsgi_app, x_proto=1, x_host=1)


@app.get('/')
def home():
    return '<p>home</p>'


@app.get('/deep/')
def deep():
    return '<p>deep</p>'


@app.get('/go')
def go():
    return redirect(url_for('deep', _external=True))
