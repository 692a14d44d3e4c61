//! Metrics of an engine on an HTTP port, as Prometheus scrapes them.
//!
//! `cargo run --release --example metrics_export`

use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;

use sidereal::catalog::Catalog;
use sidereal::{Recommender, RecommenderOptions, Request};

/// Serves one scrape, of a port that the system chooses.
///
/// # Errors
/// Those of the files, of the requests and of the network.
pub fn main() -> Result<(), Box<dyn Error>> {
    let folder = Path::new("models/industrial");
    let catalog = Arc::new(Catalog::open(&folder.join("items.jsonl"))?);
    let options = RecommenderOptions::new("cpu").with_threads(1);
    let recommender = Recommender::open(folder, catalog, &options)?;
    for item in 1..4 {
        recommender.recommend(&Request::from_history([item.to_string()]).with_beams(10))?;
    }
    assert!(recommender.recommend(&Request::from_history(["no such item"])).is_err());

    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let server = std::thread::spawn(move || serve(&listener.accept()?.0, &recommender));
    let page = scrape(&mut TcpStream::connect(address)?)?;
    server.join().expect("no panic")?;

    let samples = page.lines().filter(|line| !line.starts_with('#') && !line.ends_with(" 0"));
    samples.filter(|line| !line.contains("_bucket")).for_each(|line| println!("{line}"));
    assert!(page.contains("sidereal_requests_answered_total 3\n"));
    assert!(page.contains("sidereal_requests_refused_total{code=\"unknown_item\"} 1\n"));
    Ok(())
}

/// Answers one request with the metrics, whatever it asks for.
fn serve(mut stream: &TcpStream, recommender: &Recommender) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear(); // an empty line ends the head
    }
    let page = match recommender.metrics() {
        Ok(metrics) => metrics.to_prometheus(),
        Err(error) => return Err(std::io::Error::other(error)),
    };
    let kind = "Content-Type: text/plain; version=0.0.4";
    let len = page.len();
    write!(stream, "HTTP/1.1 200 OK\r\n{kind}\r\nContent-Length: {len}\r\n\r\n{page}")
}

fn scrape(stream: &mut TcpStream) -> std::io::Result<String> {
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    Ok(response)
}
