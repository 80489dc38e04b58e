// Asks for a URL as Rust's ureq does, with the certificates that the machine trusts.
use ureq::tls::{RootCerts, TlsConfig};

fn main() {
    let url = std::env::args().nth(1).expect("a URL");
    let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
    let agent: ureq::Agent = ureq::Agent::config_builder().tls_config(tls).build().into();
    match agent.get(&url).call() {
        Ok(answer) => println!("{}", answer.status()),
        Err(err) => {
            eprintln!("{err}");
            std::process::exit(1)
        }
    }
}
