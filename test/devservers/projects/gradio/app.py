import gradio as gr

gr.Interface(fn=lambda word: 'said ' + word.upper(), inputs=gr.Textbox(label='word'), outputs=gr.Textbox(label='out'), api_name='say').launch(server_port=7860)
