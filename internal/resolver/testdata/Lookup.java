import java.net.InetAddress;

/** Looks one name up and prints the seconds it took and the error. */
public class Lookup {
	public static void main(String[] args) {
		long began = System.nanoTime();
		String words;
		try {
			words = "found " + InetAddress.getByName(args[0]);
		} catch (Exception e) {
			words = e.toString();
		}
		System.out.printf(java.util.Locale.ROOT, "%.3f %s%n", (System.nanoTime() - began) / 1e9, words);
	}
}
