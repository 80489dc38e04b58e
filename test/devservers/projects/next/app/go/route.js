export function GET(request) {
  return Response.redirect(new URL('/said/GONE', request.url))
}
