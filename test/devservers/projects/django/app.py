import os
import sys

from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpResponse
from django.middleware.csrf import get_token
from django.urls import path

extra = {}
if os.environ.get('SECURE'):
    extra['SECURE_PROXY_SSL_HEADER'] = ('HTTP_X_FORWARDED_PROTO', 'https')
if os.environ.get('TRUSTED'):
    extra['CSRF_TRUSTED_ORIGINS'] = ['https://*.sbx.test']
if os.environ.get('ALLOWED'):
    extra['ALLOWED_HOSTS'] = ['.sbx.test', '.localhost']
settings.configure(DEBUG=True, SECRET_KEY='for a test', ROOT_URLCONF=__name__,
                   MIDDLEWARE=['django.middleware.common.CommonMiddleware', 'django.middleware.csrf.CsrfViewMiddleware'], **extra)


def form(request):
    if request.method == 'POST':
        return HttpResponse('<p>said %s</p>' % request.POST['word'].upper())
    return HttpResponse('<form method="post"><input type="hidden" name="csrfmiddlewaretoken" value="%s">'
                        '<input name="word" aria-label="word"><button>say</button></form>' % get_token(request))


urlpatterns = [path('', form), path('deep/', form)]
if __name__ == '__main__':
    execute_from_command_line(sys.argv)
