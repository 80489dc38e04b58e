import java.net.HttpURLConnection;
import java.net.InetAddress;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

/** Java's resolver or one of its HTTP clients: lookup NAME, client URL, connection URL. */
public class JavaClient {
  public static void main(String[] args) {
    try {
      int status = 200;
      switch (args[0]) {
        case "lookup" -> InetAddress.getByName(args[1]);
        case "client" -> status = HttpClient.newHttpClient()
            .send(HttpRequest.newBuilder(URI.create(args[1])).build(), HttpResponse.BodyHandlers.ofString()).statusCode();
        default -> {
          HttpURLConnection c = (HttpURLConnection) URI.create(args[1]).toURL().openConnection();
          c.getInputStream().readAllBytes();
          status = c.getResponseCode();
        }
      }
      System.out.println(status);
      System.exit(status == 200 ? 0 : 1);
    } catch (Exception e) {
      for (Throwable t = e; t != null; t = t.getCause()) {
        System.err.println(t);
      }
      System.exit(1);
    }
  }
}
