#!/bin/bash
# OpenJDK 17.0.15 (Debian 12; the machine's own)
#
# https://localhost.:PORT/, a host with the trailing dot that makes a name absolute, opened with each of Java's two clients.
# Guess: both connect, and leave the dot out of the server name of TLS, where RFC 6066 has no place for it.
# Seen:  HttpURLConnection sends its ClientHello. java.net.http.HttpClient connects and then fails with
#        IllegalArgumentException "Server name value of host_name cannot have the trailing dot": no octet is sent.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cat >Dot.java <<'J'
import java.net.ServerSocket;
import java.net.Socket;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

public class Dot {
  static int first = -1; // octet that the server saw

  public static void main(String[] args) throws Exception {
    try (ServerSocket server = new ServerSocket(0)) {
      Thread t = new Thread(() -> {
        try (Socket s = server.accept()) {
          s.setSoTimeout(10000);
          first = s.getInputStream().read();
        } catch (Exception e) {
          // nothing came
        }
      });
      t.start();
      URI uri = URI.create("https://localhost.:" + server.getLocalPort() + "/");
      try {
        if (args[0].equals("client")) {
          HttpClient.newHttpClient().send(HttpRequest.newBuilder(uri).build(), HttpResponse.BodyHandlers.ofString());
        } else {
          uri.toURL().openConnection().getInputStream();
        }
      } catch (Exception e) {
        System.out.println(e);
      }
      t.join(12000);
      System.out.println("first octet " + first);
      System.exit(0);
    }
  }
}
J
java Dot.java connection | tee connection
java Dot.java client | tee client
grep -q 'first octet 22' connection # a TLS handshake record
grep -q 'cannot have the trailing dot' client && grep -q 'first octet -1' client || { echo changed >&2; exit 1; }
